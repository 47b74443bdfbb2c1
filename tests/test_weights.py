"""Tiers of weights: what is in the page cache, what moves cost, and the hosts and engines of a fleet file."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from maestro_agents.errors import ConfigError
from maestro_agents.simulator.hardware import gpus, load_sim_fleet, models, serve
from maestro_serving import weights
from maestro_serving.hosts import CPU_SERVER_BYTES, load_host
from maestro_serving.weights import Cost, Costs

DEPLOY = Path(__file__).resolve().parents[1] / "serving" / "deploy"
GB = 10**9


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights that are on the disk for certain: dirty pages stay in memory whatever is asked."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as f:
        f.write(os.urandom(3_000_001))
        os.fsync(f.fileno())
    return path


# -- the page cache ----------------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform != "linux", reason="macOS keeps what it likes")
async def test_reading_brings_weights_into_the_page_cache_and_forgetting_lets_them_go(file: Path) -> None:
    """Both are measured, not believed; measuring itself reads nothing."""
    await weights.forget([file])
    assert weights.cached_bytes([file]) == 0
    assert weights.cached_bytes([file]) == 0
    assert not weights.in_cache([file])
    await weights.read([file])
    assert weights.cached_bytes([file]) == 3_000_001
    assert weights.in_cache([file])


async def test_reading_stops_when_nobody_wants_it_any_more(file: Path) -> None:
    """A prefetch that is cancelled ends soon, and leaves no thread that reads on."""
    many = [file] * 100_000
    task = asyncio.create_task(weights.read(many))
    await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(asyncio.CancelledError):
            await task


def test_what_is_not_there_is_in_no_cache(tmp_path: Path) -> None:
    """No files, missing files, empty files."""
    (tmp_path / "empty.safetensors").touch()
    assert weights.cached_bytes([tmp_path / "none"]) is None
    assert weights.cached_bytes([tmp_path / "empty.safetensors"]) == 0
    assert not weights.in_cache([])
    assert not weights.in_cache([tmp_path / "none"])


def test_a_models_weights_are_its_safetensors(tmp_path: Path) -> None:
    """Where there are several formats, vLLM takes these."""
    for name in ("b.safetensors", "a.safetensors", "pytorch_model.bin", "config.json"):
        (tmp_path / name).touch()
    assert [f.name for f in weights.weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]


# -- costs -------------------------------------------------------------------------------------------------------------
def test_a_measured_cost_takes_the_place_of_the_estimate_and_fades(tmp_path: Path) -> None:
    """The first measurement counts whole, later ones move it; the file brings them to the next agent."""
    costs, guess = Costs(tmp_path / "costs.json"), Cost(took_s=40.0)
    assert costs.cost("a", "disk", "gpu", guess) == guess
    costs.learn("a", "disk", "gpu", took_s=10.0, moved_bytes=5)
    assert costs.cost("a", "disk", "gpu", guess) == Cost(took_s=10.0, moved_bytes=5, measured=1)
    costs.learn("a", "disk", "gpu", took_s=20.0, moved_bytes=5)
    again = Costs(tmp_path / "costs.json").cost("a", "disk", "gpu", guess)
    assert (again.took_s, again.measured) == (pytest.approx(13.0), 2)
    assert costs.cost("a", "gpu", "disk", guess) == guess, "each direction has its own"


def test_a_damaged_file_of_costs_costs_only_what_was_learned(tmp_path: Path) -> None:
    """The agent starts all the same."""
    for text in ("{", "[]", '{"a disk>gpu": {"took": 1}}'):
        (tmp_path / "costs.json").write_text(text)
        assert Costs(tmp_path / "costs.json").cost("a", "disk", "gpu", Cost(took_s=1.0)).took_s == 1.0


def test_estimates_come_from_the_hardware_profile() -> None:
    """Before it was measured a move takes what the simulator says; without a profile, what an A100 would by bytes."""
    served = serve(models()["qwen3-14b"], gpus()["a100-80g"])
    for (was, to), does in weights.DOES.items():
        cost = weights.estimate(was, to, served.weight_bytes, served)
        assert cost.took_s >= 0
        assert (cost.moved_bytes == 0) == (does in {"stop", "stop, forget", "sleep 2", "forget"})
    t = served.tiers
    assert weights.estimate("sleeping", "gpu", served.weight_bytes, served).took_s == t.from_sleeping_s
    assert weights.estimate("dropped", "gpu", served.weight_bytes, None).took_s == pytest.approx(t.reload_s, rel=0.01)


# -- hosts -------------------------------------------------------------------------------------------------------------
def test_a_node_has_an_engine_for_each_model_and_gpu_that_it_fits(tmp_path: Path) -> None:
    """Named as in the simulator, of the same sizes, and those awake at the start are those that it starts with."""
    path = DEPLOY / "fleet.node-emulated.toml"
    host, sim = load_host(path, "n1", tmp_path), load_sim_fleet(path)
    assert len(host.engines) == 16
    assert set(host.at_start) == {e.spec.engine_id for e in sim.engines} == {"m1.n1.0", "m1.n1.1"}
    assert {g.gpu_id: g.usable_bytes for g in host.gpus} == {g.gpu_id: g.usable_bytes for g in sim.gpus.values()}
    assert host.ram_bytes == sim.nodes["n1"].host_ram_bytes == 170 * GB
    one = host.engines[0]
    assert one.spec.url == ""
    assert one.kv_floor_bytes == one.spec.kv_bytes_of(16384, 0)
    assert one.hbm_bytes + one.kv_floor_bytes <= host.gpus[0].usable_bytes


def test_every_simulated_fleet_can_go_live(tmp_path: Path) -> None:
    """The same GPUs on the same nodes; models over several GPUs are where they start, and share those with nobody."""
    for path in DEPLOY.glob("fleet.sim-*.toml"):
        sim = load_sim_fleet(path)
        for node in sim.nodes.values():
            host = load_host(path, node.node_id, tmp_path)
            assert [g.gpu_id for g in host.gpus] == list(node.gpus)
            wide = {g for e in host.engines if len(e.gpus) > 1 for g in e.gpus}
            assert wide == {g for e in sim.engines if len(e.gpus) > 1 for g in e.gpus if g in node.gpus}
            assert not any(e.gpus[0] in wide for e in host.engines if len(e.gpus) == 1)


def tiny(folder: Path) -> Path:
    """A model's folder: its configuration and a megabyte of weights."""
    folder.mkdir(exist_ok=True)
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    (folder / "model.safetensors").write_bytes(b"0" * 1_000_000)
    return folder


REAL = """
[[gpu]]
kind = "cpu"
count = 2
memory_gb = 3
cpu_core = 0
models = ["chat"]
[[model]]
name = "chat"
slots = 8
max_model_len = 2048
[model.launch]
kind = "vllm"
model_path = "tiny"
kv_cache_memory_bytes = 268435456
"""


def test_a_real_model_is_sized_by_its_files(tmp_path: Path) -> None:
    """Weights from its safetensors, KV per token from its configuration; on a CPU each GPU is a core."""
    tiny(tmp_path / "tiny")
    (tmp_path / "fleet.toml").write_text(REAL)
    host = load_host(tmp_path / "fleet.toml", "local.0", tmp_path)
    a, b = host.engines
    assert (a.engine_id, b.engine_id) == ("chat.local.0.0", "chat.local.0.1")
    assert (a.weight_bytes, a.server_bytes) == (1_000_000, CPU_SERVER_BYTES)
    assert a.kv_floor_bytes == a.spec.kv_bytes == 268435456, "stock vLLM gives no KV memory back"
    assert a.spec.kv_bytes_per_token == 2 * 2 * 2 * 64 * 2
    assert [g.cpu_core for g in host.gpus] == [0, 1 % (os.cpu_count() or 1)]
    assert a.weight_files == (tmp_path / "tiny" / "model.safetensors",)


def test_a_running_server_is_taken_at_the_one_gpu_where_it_is(tmp_path: Path) -> None:
    """``url``: it belongs to the GPU whose table names it, and to no other."""
    tiny(tmp_path / "tiny")
    text = REAL.replace("count = 2", "count = 1").replace(
        'kind = "vllm"', 'kind = "vllm"\nurl = "http://127.0.0.1:9/v1"'
    )
    (tmp_path / "fleet.toml").write_text(f'{text}\n[[gpu]]\nkind = "cpu"\nmemory_gb = 3\n')
    assert load_host(tmp_path / "fleet.toml", "local.0", tmp_path).engines[0].spec.url == "http://127.0.0.1:9/v1"
    (tmp_path / "fleet.toml").write_text(text.replace('models = ["chat"]', ""))
    with pytest.raises(ConfigError, match="'chat' is a server that runs: name it in the models of the one"):
        load_host(tmp_path / "fleet.toml", "local.0", tmp_path)


BOTH = REAL.replace('["chat"]', '["chat", "b"]') + REAL[REAL.index("[[model]]") :].replace("chat", "b")
WRONG = {
    "no GPUs": ('[[engine]]\nid = "a"\nmodel = "m"\nurl = "http://127.0.0.1:1/v1"\n', r"has no \[\[gpu\]\]"),
    "an unknown GPU": (REAL.replace("memory_gb = 3", ""), "toml:3: unknown GPU 'cpu': give its memory_gb too"),
    "a known GPU with a size": (REAL.replace('"cpu"', '"l4-24g"'), "toml:5: how large a l4-24g is is known"),
    "too small a GPU": (REAL.replace("memory_gb = 3", "memory_gb = 1"), "toml:8: model 'chat' fits no GPU of this fleet"),
    "an unknown model": (REAL.replace('["chat"]', '["chat", "x"]'), "toml:7: unknown model 'x': add"),
    "two at the start": (BOTH, "toml:7: chat and b need 3.9 GB, local.0.0 has 3.0 GB"),
    "a model of no size": (REAL.replace('model_path = "tiny"', 'model_path = "org/model"'), "toml:12: model .chat.: how large is it"),
    "a node in two clusters": (
        '[[gpu]]\nkind = "l4-24g"\nnode = "n"\n[[gpu]]\nkind = "l4-24g"\nnode = "n"\ncluster = "far"\n',
        "toml:7: node 'n' is in cluster 'local' already",
    ),
    "a node many times": ('[[gpu]]\nkind = "l4-24g"\nnode = "n"\nnodes = 2\n', "toml:4: node 'n' is one node"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "says"), WRONG.values(), ids=WRONG)
def test_a_wrong_fleet_is_told_where_and_what(text: str, says: str, tmp_path: Path) -> None:
    """One line: the file's line, what is wrong, what to do."""
    tiny(tmp_path / "tiny")
    (tmp_path / "fleet.toml").write_text(text)
    with pytest.raises(ConfigError, match=says) as e:
        load_host(tmp_path / "fleet.toml", "local.0", tmp_path)
    assert "\n" not in str(e.value)
