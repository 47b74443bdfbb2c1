"""Models that share emulated GPUs, placed live and in the simulator by the same policies: the bench of that, in small."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from maestro_agents.cli.bench import live_play, place, place_cpu
from maestro_agents.cli.simulate.tables import cells
from maestro_agents.core import EngineSpec
from maestro_agents.fleet import load_tables
from maestro_agents.nodes import EngineReport, GpuReport, Move, NodeReport
from maestro_agents.queue.embedded import find_server
from maestro_serving.hosts import load_host

GB = 10**9
# Two models of which one fits beside the other with little KV memory only.
FLEET = """
[[gpu]]
kind = "a100-40g"
node = "n1"
host_ram_gb = 60
models = ["m1", "m2"]
""" + "".join(
    f"""
[[model]]
name = "m{n}"
profile = "qwen2.5-7b"
slots = 32
max_model_len = 8192
"""
    for n in (1, 2, 3)
)


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "place.toml"
    path.write_text(FLEET)
    return path


def test_the_workload_is_heavy_tailed_fits_the_fleet_and_is_fixed_by_its_seed(fleet: Path) -> None:
    """The first model gets the most work, every call fits, arrivals scale with the speed; another seed is another workload."""
    on = place.sim_fleet(fleet, 1.0)
    made = place.workload_of(on, runs=200, seed=0)
    assert made == place.workload_of(on, runs=200, seed=0)
    assert made != place.workload_of(on, runs=200, seed=1)
    calls = [s for run in made.runs for s in run.stages]
    assert max(s.prompt_tokens + s.output_tokens for s in calls) <= 8192
    asked = Counter({m: sum(place.REFERENCE.call_s(s) for s in calls if s.model == m) for m in ("m1", "m2", "m3")})
    assert [m for m, _ in asked.most_common()] == ["m1", "m2", "m3"]
    fast = place.workload_of(on, runs=200, seed=0, speed=4.0)
    assert fast.window_s == made.window_s / 4
    assert [r.at_s * 4 for r in fast.runs] == pytest.approx([r.at_s for r in made.runs])


def test_a_policy_that_moves_models_begins_with_the_first_of_each_gpu(fleet: Path, tmp_path: Path) -> None:
    """`static` begins with all that the file starts; at a speed every emulated engine is told so."""
    for policy, models in (("static", ["m1", "m2"]), ("ours", ["m1"])):
        place.write_start(fleet, tmp_path / "started.toml", policy=policy, speed=2.0)
        tables = load_tables(tmp_path / "started.toml")
        assert tables.gpus[0].models == models
        assert [tables.launched(n)[1].args for n in range(3)] == [("--speed", "2")] * 3
        assert tables.gpus[0].host_ram_gb == 60


def test_the_simulator_plays_at_the_speed_of_the_emulated_engines(fleet: Path) -> None:
    """Twice the speed on half the seconds: every figure that is a time is halved, but for what a policy's own constants weigh."""
    figures: list[float] = []
    for speed in (1.0, 2.0):
        on = place.sim_fleet(fleet, speed)
        played, _ = live_play.simulated(place.workload_of(on, runs=20, seed=0, speed=speed), on, "static")
        figures.append(played.figures["completion_p95_s"])
    assert figures[1] == pytest.approx(figures[0] / 2, rel=0.02)


def test_prompts_of_a_conversation_begin_alike(fleet: Path) -> None:
    """A call that goes on with an earlier one has its prompt to begin with; calls of other conversations share nothing."""
    on = place.sim_fleet(fleet, 1.0)
    run = next(r for r in place.workload_of(on, runs=50, seed=0).runs if any(s.shares >= 0 for s in r.stages))
    n = next(n for n, s in enumerate(run.stages) if s.shares >= 0)
    before, after = live_play.prompt_of(run, run.stages[n].shares), live_play.prompt_of(run, n)
    both = min(len(before), len(after))
    assert before[:both] == after[:both]
    assert len(after) == run.stages[n].prompt_tokens
    other = next(m for m, s in enumerate(run.stages) if s.shares < 0 and m != run.stages[n].shares)
    assert live_play.prompt_of(run, other)[:16] != after[:16]


def test_a_report_of_more_memory_than_there_is_counts_as_over_committed_and_moves_are_kept_once() -> None:
    """Of a GPU or of the host's sleeping weights; a report that is read twice is one."""
    watch = place.Watch()

    def report(at_s: float, held_gb: int, asleep_gb: int) -> NodeReport:
        spec = EngineSpec(engine_id="m.g", url="", model="m")
        engine = EngineReport(spec=spec, gpu_id="g", tier="sleeping", to="sleeping", weight_bytes=asleep_gb * GB)
        gpu = GpuReport(gpu_id="g", memory_bytes=40 * GB, usable_bytes=40 * GB, held_bytes=held_gb * GB)
        move = Move(engine_id="m.g", was="gpu", to="sleeping", began_at_s=1.0, took_s=0.5)
        return NodeReport(node_id="n", at_s=at_s, ram_bytes=20 * GB, gpus=[gpu], engines=[engine], moves=[move])

    for each in (report(1.0, 40, 20), report(1.0, 41, 21), report(2.0, 40, 20)):
        watch.hear(each)
    assert (watch.reports, watch.over, len(watch.moves)) == (2, [], 1)
    watch.hear(report(3.0, 41, 20))
    watch.hear(report(4.0, 40, 21))
    assert len(watch.over) == 2
    assert watch.peak > 1


@pytest.mark.slow
@pytest.mark.skipif(find_server() is None, reason="no Redis server here")
@pytest.mark.timeout(240)
def test_a_play_ends_every_run_over_commits_nothing_and_has_a_live_and_a_simulated_row(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real Redis, scheduler, node agent and an emulated GPU; every move with its cost; the same runs counted by the same scorer."""
    ended: list[None] = []
    out = tmp_path / "events.jsonl"
    bed = place.emulated(fleet, runs=4, seed=0, speed=6.0)
    found = place.run(bed, ["ours"], seed=0, events_out=out, look=lambda: ended.append(None))
    json.dumps(found)
    assert len(ended) == 4
    live, simulated = found["rows"]
    assert (live["played"], simulated["played"]) == ("live", "simulated")
    checks = found["checks"]["ours"]
    assert (checks["over"], checks["violations"], checks["failed"], checks["reserved_at_end"]) == ([], 0, {}, {})
    assert checks["reports"] > 3
    assert len(cells(live)) == len(cells(simulated)) == len(place.HEAD)
    assert live["stages"] == simulated["stages"] == found["workload"]["stages"]
    moved = {(m["engine_id"].partition(".")[0], m["was"], m["to"]) for m in found["moves"]["ours"]}
    assert ("m1", "disk", "gpu") in moved
    assert any(model != "m1" for model, _, _ in moved)
    assert all(m["took_s"] > 0 and not m["error"] for m in found["moves"]["ours"])
    lines: list[Any] = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(isinstance(line, dict) for line in lines) == 2
    kinds = Counter(str(line[0]) for line in lines if not isinstance(line, dict))
    assert kinds["done"] == 2 * 4
    assert kinds["end"] == kinds["ready"] == 2 * found["workload"]["stages"]
    place.show(found)
    assert "Live less simulated" in capsys.readouterr().out


def test_on_a_core_one_of_two_engines_has_all_of_the_kv_memory_or_each_has_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`static` begins with both, the others with the first; the simulator's core has as much, and every call fits."""
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_key_value_heads": 2, "num_attention_heads": 4,
        "head_dim": 64, "hidden_size": 256, "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setenv("MAESTRO_VLLM_MODEL", str(tmp_path))
    bed = place_cpu.real(tmp_path, runs=10, seed=0)
    for policy, kv_bytes, start in (("static", place_cpu.KV_BYTES // 2, 2), ("ours", place_cpu.KV_BYTES, 1)):
        place.write_start(bed.fleet, tmp_path / "started.toml", policy=policy, speed=1.0)
        host = load_host(tmp_path / "started.toml", "n1", tmp_path)
        assert len(host.at_start) == start
        assert {e.spec.kv_bytes for e in host.engines} == {kv_bytes}
        need = sum(e.hbm_bytes + e.spec.kv_bytes for e in host.engines)
        assert (need <= host.gpus[0].usable_bytes) == (policy == "static")
        on = bed.sim(tmp_path / "started.toml", policy, ())
        played, _ = live_play.simulated(bed.workload, on, policy)
        assert played.figures["refusals"] == 0
        assert (played.figures["wakes"] + played.figures["cold_starts"] > 0) == (policy == "ours")
