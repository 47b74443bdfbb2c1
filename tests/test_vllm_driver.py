"""The driver of a vLLM server, on an emulated one that a program called ``vllm`` starts; and what its metrics mean, old and new.

The same on a real vLLM: ``tests/test_node_vllm.py``.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from maestro_agents.core import EngineSpec
from maestro_agents.errors import ConfigError, EngineUnavailable
from maestro_agents.fleet import Launch
from maestro_serving import vllm_driver
from maestro_serving.drivers import NodeEngine, NodeGpu
from maestro_serving.vllm import read_account, vllm_command
from maestro_serving.vllm_driver import VllmDriver, memory_of

PROGRAM = """#!{python}
import os, sys
words = sys.argv[1:]
at = {{w: words[n + 1] for n, w in enumerate(words[:-1]) if w.startswith("--")}}
assert words[0] == "serve" and os.environ["VLLM_SERVER_DEV_MODE"] == "1", words
if "--broken" in words:
    sys.exit("this vLLM does not start")
argv = ["-m", "maestro_agents.cli", "emulate", "--model", at["--served-model-name"], "--port", at["--port"], "--dev-mode"]
os.execv({python!r}, [{python!r}, *argv])
"""


def engine(*args: str, launch_url: str = "") -> NodeEngine:
    spec = EngineSpec(engine_id="tiny.n.0", url=launch_url, model="tiny", kv_bytes=1 << 28)
    launch = Launch(kind="vllm", model_path="tiny", args=args, url=launch_url)
    return NodeEngine(spec=spec, gpus=("n.0",), launch=launch, weight_bytes=1, server_bytes=1, kv_floor_bytes=1 << 28)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeGpu:
    program = tmp_path / "vllm"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("MAESTRO_VLLM", str(program))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    return NodeGpu(gpu_id="n.0", index=0, kind="cpu", memory_bytes=1, usable_bytes=1, cpu_core=0, state=tmp_path)


@pytest_asyncio.fixture
async def driver(gpu: NodeGpu) -> AsyncIterator[VllmDriver]:
    found = VllmDriver(engine(), gpu)
    await found.start()
    yield found
    await found.stop()
    await found.close()


async def idle(driver: VllmDriver) -> None:
    """The proof of a wake has left its engine."""
    async with asyncio.timeout(10):
        while (await driver.look()).running != 0:
            await asyncio.sleep(0.02)


async def test_a_server_goes_to_sleep_and_wakes_from_either_level(driver: VllmDriver) -> None:
    """It is asleep by its own word, healthy all the while, and awake once it has answered."""
    for level in (1, 2):
        await driver.sleep(level)
        look = await driver.look()
        assert (look.alive, look.healthy, look.asleep) == (True, True, level)
        await driver.wake()
        assert (await driver.look()).asleep is None
        await idle(driver)
    assert (await driver.look()).generated_tokens == 3, "a start and two wakes were proven by a token each"


async def test_a_wake_that_does_not_serve_is_a_failure(driver: VllmDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with its weights back and no KV memory says that it sleeps; should it not, a request that hangs tells."""
    await driver.sleep(1)
    post = driver._post

    async def half(path: str, body: Any = None, limit_s: float = 5.0) -> httpx.Response:
        return await post("/wake_up?tags=weights" if path == "/wake_up" else path, body, limit_s)

    monkeypatch.setattr(driver, "_post", half)
    with pytest.raises(EngineUnavailable, match="was woken and says that it sleeps"):
        await driver.wake()

    async def says_no() -> bool:
        return False

    monkeypatch.setattr(vllm_driver, "SERVES_LIMIT_S", 0.3)
    monkeypatch.setattr(driver, "_asleep", says_no)
    with pytest.raises(EngineUnavailable, match="POST /v1/completions"):
        await driver.wake()


async def test_a_server_that_dies_in_the_middle_of_a_move_is_not_waited_for(driver: VllmDriver) -> None:
    """The move fails at once, not at its time limit."""
    async with httpx.AsyncClient(trust_env=False) as http:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 2000, "min_tokens": 2000}
        busy = asyncio.create_task(http.post(f"{driver._url}/completions", json=body, timeout=60))
        async with asyncio.timeout(10):
            while (await driver.look()).running != 1:
                await asyncio.sleep(0.02)
        sleeping = asyncio.create_task(driver.sleep(1))  # it waits for what runs
        done, _ = await asyncio.wait([sleeping], timeout=0.2)
        assert not done
        os.kill(driver._kept.pid, signal.SIGKILL)
        with pytest.raises(EngineUnavailable):
            await sleeping
        with pytest.raises(httpx.TransportError):
            await busy
    async with asyncio.timeout(10):
        while (await driver.look()).alive:
            await asyncio.sleep(0.02)


async def test_a_server_that_does_not_start_says_why(gpu: NodeGpu) -> None:
    """The end of its log is in the error, and nothing is left."""
    driver = VllmDriver(engine("--broken"), gpu)
    with pytest.raises(EngineUnavailable, match="this vLLM does not start"):
        await driver.start()
    assert not (gpu.state / "engines" / "tiny.n.0.json").exists()
    await driver.close()


async def test_a_server_of_somebody_else_is_watched_and_never_ended(driver: VllmDriver, gpu: NodeGpu) -> None:
    """``url``: taken as it is, put to sleep since its endpoints answer; not started, not ended."""
    adopted = VllmDriver(engine(launch_url=driver._url), gpu)
    assert await adopted.adopt() == driver._url
    await adopted.sleep(1)
    assert (await driver.look()).asleep == 1
    await adopted.wake()
    await adopted.stop()
    assert (await adopted.look()).healthy
    with pytest.raises(EngineUnavailable, match="was not started here"):
        await adopted.start()
    await driver.stop()
    assert (await adopted.look()).alive is False
    await adopted.close()


def test_the_memory_of_a_process_is_that_of_all_below_it() -> None:
    """Host memory is measured where the system says it; a GPU's only where one is."""
    host, device = memory_of(os.getpid())
    assert host > 1e7 or sys.platform != "linux"
    assert device == -1
    assert memory_of(2**22 + 1)[0] <= 0


# -- metrics and flags ---------------------------------------------------------------------------------------------------
NEW = """
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 40.0
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:generation_tokens_total{engine="0",model_name="m"} 500.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="awake"} 0.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="weights_offloaded"} 0.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="discard_all"} 1.0
"""


def test_old_and_new_names_of_metrics_say_the_same() -> None:
    """vLLM renamed some; a page that has both counts once."""
    now = read_account(NEW, "m")
    assert (now.running, now.waiting, now.kv_use, now.preemptions, now.generated) == (2, 1, 0.25, 3, 500.0)
    assert (now.queried, now.found, now.asleep) == (100.0, 40.0, 2)
    old = NEW.replace("vllm:kv_cache_usage", "vllm:gpu_cache_usage").replace(
        "vllm:prefix_cache", "vllm:gpu_prefix_cache"
    )
    assert read_account(old, "m") == now
    assert read_account(NEW + old, "m").kv_use == 0.25
    assert read_account("", "m").running == read_account("<html>", "m").running == -1
    assert read_account(NEW.replace('"discard_all"} 1', '"discard_all"} 0'), "m").asleep is None


def test_two_cores_behind_one_port_add_up() -> None:
    """Requests are summed, the share of KV memory is the mean."""
    both = read_account(NEW + NEW.replace('engine="0"', 'engine="1"').replace("0.25", "0.75"), "m")
    assert (both.running, both.kv_use) == (4, 0.5)


def test_a_server_that_can_sleep_listens_on_loopback_only() -> None:
    """Its admin endpoints know no key. On a CPU vLLM refuses the flag; several GPUs are tensor-parallel unless said otherwise."""
    common = {"program": "vllm", "model": "m", "served_model": "m", "port": 1, "sleeps": True}
    with pytest.raises(ConfigError, match="listens on loopback"):
        vllm_command(**common, host="0.0.0.0")
    on_gpus = vllm_command(**common, gpus=(2, 3))
    assert "--enable-sleep-mode" in on_gpus.argv
    assert on_gpus.argv[-3:-1] == ("--tensor-parallel-size", "2")
    assert on_gpus.env["CUDA_VISIBLE_DEVICES"] == "2,3"
    on_cpu = vllm_command(**common, cpu_core=1, kv_cache_memory_bytes=1)
    assert "--enable-sleep-mode" not in on_cpu.argv
    assert on_cpu.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert "--tensor-parallel-size" not in vllm_command(**common, gpus=(0, 1), args=("-tp=1",)).argv
