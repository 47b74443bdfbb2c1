"""Nodes on a Ray cluster: what each asks for, what is refused, and real clusters of several raylets on loopback whose machines die."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maestro_agents import guard
from maestro_agents.cli.bench.ray import alive, below
from maestro_agents.cli.up import Stack
from maestro_agents.errors import ConfigError
from maestro_agents.fleet import load_fleet, load_tables
from maestro_agents.queue.embedded import find_server
from maestro_serving.ray_nodes import LoopbackCluster, bundles, check_address, check_reachable
from maestro_serving.vllm import vllm_command

EMULATED = """
[[gpu]]
kind = "l4-24g"
nodes = 3
models = ["m"]
ray_resource = "GPU"

[[model]]
name = "m"
profile = "qwen2.5-7b"
max_model_len = 4096
[model.launch]
kind = "emulator"
args = ["--speed", "50"]
"""
REAL = """
[[gpu]]
kind = "{kind}"
count = {count}
node = "n1"
{more}
[[model]]
name = "m"
profile = "qwen2.5-7b"
[model.launch]
kind = "vllm"
model_path = "{path}"
"""

on_a_cluster = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="no Ray here: pip install 'maestro-agents[ray]'"
    ),
    pytest.mark.skipif(find_server() is None, reason="no Redis server here"),
    pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked at in /proc"),
]


def written(folder: Path, text: str) -> Path:
    path = folder / "fleet.toml"
    path.write_text(text)
    return path


def real(folder: Path, *, kind: str = "h100-80g", count: int = 2, more: str = "", path: str = "org/model") -> Path:
    return written(folder, REAL.format(kind=kind, count=count, more=more, path=path))


# -- what is asked for ---------------------------------------------------------------------------------------------------
def test_a_node_of_real_gpus_asks_for_them_and_a_cpu_each(tmp_path: Path) -> None:
    """One bundle for a node, all its tables together."""
    two = '[[gpu]]\nkind = "h100-80g"\nnode = "n1"\ncount = 1\n'
    path = real(tmp_path)
    path.write_text(two + path.read_text())
    assert bundles(load_tables(path)) == {"n1": {"CPU": 3.0, "GPU": 3.0}}


def test_cpu_nodes_and_emulated_gpus_leave_real_gpus_alone(tmp_path: Path) -> None:
    """They ask for CPUs only, unless the file names a resource."""
    assert bundles(load_tables(real(tmp_path, kind="cpu", more="memory_gb = 3\n"))) == {"n1": {"CPU": 2.0}}
    emulated = written(tmp_path, EMULATED.replace('ray_resource = "GPU"\n', ""))
    assert bundles(load_tables(emulated)) == {f"local.{n}": {"CPU": 1.0} for n in range(3)}


def test_a_node_asks_for_the_resource_that_its_table_names(tmp_path: Path) -> None:
    """One for each GPU; of Ray's own accelerator types, of which a machine has one, a little."""
    asks = bundles(load_tables(real(tmp_path, more='ray_resource = "rack-7"\n')))
    assert asks == {"n1": {"CPU": 2.0, "GPU": 2.0, "rack-7": 2.0}}
    asks = bundles(load_tables(real(tmp_path, more='ray_resource = "accelerator_type:H100"\n')))
    assert asks == {"n1": {"CPU": 2.0, "GPU": 2.0, "accelerator_type:H100": 0.001}}


def test_a_model_path_that_only_this_machine_understands_is_refused(tmp_path: Path) -> None:
    """The fleet file travels, its folder does not; the error names the line."""
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ConfigError, match=r"fleet.toml:12: model_path = 'tiny' is meant from this file's folder"):
        bundles(load_tables(real(tmp_path, path="tiny")))
    assert bundles(load_tables(real(tmp_path, path=str(tmp_path / "tiny"))))


def test_a_fleet_without_nodes_is_refused(tmp_path: Path) -> None:
    """Engines with URLs have no place that Ray could choose."""
    path = written(tmp_path, '[[engine]]\nid = "a"\nmodel = "m"\nurl = "http://127.0.0.1:1/v1"\n')
    with pytest.raises(ConfigError, match=r"Ray places nodes, and a node is made of its GPUs"):
        bundles(load_tables(path))


@pytest.mark.parametrize(
    ("redis_url", "key", "says"),
    [
        ("redis://127.0.0.1:6379/0", "k" * 32, "they cannot reach a Redis at 127.0.0.1"),
        ("unix:///run/redis.sock", "k" * 32, "they cannot reach a Redis at /run/redis.sock"),
        ("redis+sentinel://10.0.0.1,localhost/main", "k" * 32, "they cannot reach a Redis at localhost"),
        ("redis://10.0.0.1:6379/0", "", "Name its file by MAESTRO_ENGINE_KEY_FILE"),
    ],
)
def test_several_hosts_need_a_redis_and_engines_that_they_can_reach(redis_url: str, key: str, says: str) -> None:
    """On one host loopback is enough; on two it is refused, with what to do."""
    check_reachable(["10.0.0.7", "10.0.0.7"], redis_url=redis_url, engine_key=key)
    with pytest.raises(ConfigError, match=says):
        check_reachable(["10.0.0.7", "10.0.0.8"], redis_url=redis_url, engine_key=key)


@pytest.mark.parametrize(
    ("address", "why"), [("127.0.0.1:9", "Connection refused"), ("nowhere", "it looks like HOST:PORT")]
)
def test_a_cluster_that_is_not_there_is_one_line_at_once(address: str, why: str) -> None:
    """With what to start; Ray itself would try for minutes."""
    with pytest.raises(ConfigError, match=f"--ray {address}: {why}. Start a cluster with"):
        check_address(address)


def test_without_ray_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, before anything is placed."""
    if find_server() is None:
        pytest.skip("no Redis server here")
    monkeypatch.setitem(sys.modules, "ray", None)
    stack = Stack(load_fleet(written(tmp_path, EMULATED)), ray="auto")
    with pytest.raises(ConfigError, match=r"pip install 'maestro-agents\[ray\]'"):
        stack.start()
    assert stack.pids() == {}


def test_an_engine_gets_the_gpus_that_its_agent_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node's GPU 1 is the second of those that Ray gave its actor, not the machine's."""

    def visible() -> str:
        made = vllm_command(program="vllm", model="m", served_model="m", port=1, max_num_seqs=1, gpus=(0, 1))
        return made.env["CUDA_VISIBLE_DEVICES"]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible() == "0,1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert visible() == "4,6"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's death")
def test_a_command_does_not_outlive_its_guard(tmp_path: Path) -> None:
    """Ray kills the children of a worker that it ends, the guard among them."""
    running = guard.spawn(["sleep", "100"], log=tmp_path / "log")
    (child, started), *_ = below(running.guard.pid).items()
    assert child == running.pid
    running.guard.kill()
    assert eventually(lambda: not alive(child, started))
    running.stop()


def eventually(true: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Processes are other people's clocks: ask again until the answer is yes or the time is up."""
    give_up_at = time.monotonic() + within_s
    while time.monotonic() < give_up_at:
        if true():
            return True
        time.sleep(0.1)
    return False


# -- real clusters -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cluster() -> Iterator[LoopbackCluster]:
    """Two machines with a GPU each, that is only counted."""
    cluster = LoopbackCluster(2, {"CPU": 1.0, "GPU": 1.0})
    yield cluster
    cluster.stop()


class TestCluster:
    pytestmark = on_a_cluster

    def test_nodes_are_placed_wait_and_come_back_where_there_is_room(
        self, cluster: LoopbackCluster, tmp_path: Path
    ) -> None:
        """Three nodes on two machines: one waits and nobody else does; a third machine takes it; without its raylet a node's processes
        end, and it comes back on a fourth. Its end leaves no process and no place taken.
        """
        lines: list[str] = []
        stack = Stack(
            load_fleet(written(tmp_path, EMULATED)), ray=cluster.address, logs=tmp_path / "logs", notice=lines.append
        )
        with stack:
            assert stack.ray
            at = stack.ray.look()
            (waits,) = [n for n, p in at.items() if not p.ray_node]
            assert at[waits].words() == "waits for a machine with 1 CPU, 1 GPU"
            assert len({p.ray_node for p in at.values()}) == 3
            assert {e.engine_id for e in stack.engines} == {f"m.{n}.0" for n in at if n != waits}

            third = cluster.add()
            assert eventually(lambda: len(stack.engines) == 3, within_s=120)
            assert stack.ray.look()[waits].ray_node == third
            assert eventually(lambda: any(line.endswith("joined the Ray cluster") for line in lines))

            urls = {e.engine_id: e.url for e in stack.engines}
            ran = below(cluster.raylet_pid(third))
            os.kill(cluster.raylet_pid(third), signal.SIGKILL)
            assert eventually(lambda: not any(alive(pid, started) for pid, started in ran.items()), within_s=60)
            assert eventually(lambda: len(stack.engines) == 2)
            fourth = cluster.add()
            assert eventually(lambda: len(stack.engines) == 3, within_s=150)
            assert stack.ray.look()[waits].ray_node == fourth
            moved = {e.engine_id for e in stack.engines if e.url != urls[e.engine_id]}
            assert moved == {f"m.{waits}.0"}
            assert any("is gone" in line for line in lines)
            ran = {pid: s for n in (cluster.head, fourth) for pid, s in below(cluster.raylet_pid(n)).items()}
            agents = [pid for p in stack.ray.look().values() for pid in [p.pid] if pid]
            assert len(agents) == 3
        assert eventually(lambda: not any(alive(pid, ran.get(pid, "")) for pid in agents))

    def test_up_ends_with_all_that_ray_placed_for_it(self, cluster: LoopbackCluster, tmp_path: Path) -> None:
        """`maestro up --ray HOST:PORT`: Ctrl-C ends agents in order, kill -9 has Ray end them."""
        path = written(tmp_path, EMULATED.replace("nodes = 3", "nodes = 1"))
        for number in (signal.SIGINT, signal.SIGKILL):
            up = subprocess.Popen(
                [sys.executable, "-m", "maestro_agents.cli", "up", str(path), "--ray", cluster.address],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
            assert up.stdout
            out: list[str] = []
            for line in up.stdout:
                out.append(line)
                if "export MAESTRO_REDIS_URL=" in line:
                    break
            assert "export MAESTRO_REDIS_URL=" in out[-1], "".join(out)
            agents = _agents()
            assert len(agents) == 1
            up.send_signal(number)
            rest = up.communicate(timeout=90)[0]
            if number is signal.SIGINT:
                assert "everything has ended" in rest
            assert eventually(lambda agents=agents: not any(alive(*a) for a in agents.items()), within_s=60)
            assert eventually(lambda: not _agents(), within_s=60)


def _agents() -> dict[int, str]:
    """Node agents that stand under some raylet of ours, with their starts."""
    found: dict[int, str] = {}
    for pid, started in below(os.getpid()).items():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"node" in words and b"--node" in words and b"maestro_agents.cli" in words and b"-I" not in words:
                found[pid] = started
    return found
