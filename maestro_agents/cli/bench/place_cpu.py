"""The small bed of `maestro bench place`: two real vLLM engines on one CPU core, which stands for their GPU.

Its memory, accounted, holds one engine with all of the KV memory, or both with half of it (`static`). Sleep and wake are really
driven; on a CPU they free nothing, and engines that are both awake share the core.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from maestro_agents.cli.bench.live_play import arriving
from maestro_agents.cli.bench.place import Bed
from maestro_agents.cli.bench.stack import MODEL_PATH_ENV, label
from maestro_agents.errors import ConfigError
from maestro_agents.nodes import Move, Tier
from maestro_agents.predict.memory import KvShape
from maestro_agents.simulator.hardware import (
    Gpu,
    Model,
    Served,
    SimCluster,
    SimEngine,
    SimFleet,
    SimGpu,
    SimModel,
    SimNode,
    Tiers,
    gpus,
    named_profile,
)
from maestro_agents.simulator.workload import Workload, sample
from maestro_serving.hosts import CPU_SERVER_BYTES
from maestro_serving.weights import size_bytes, weight_files

MODELS: Final = ("m1", "m2")
SLOTS: Final = 8
MAX_MODEL_LEN: Final = 1024
KV_BYTES: Final = 2_359_296
"""Two requests of the longest length and a quarter; `static` has half of it for each engine, one request and an eighth."""

PROMPTS: Final = 8
"""Prompts are so many times shorter than recorded, answers are not: a core reads 2,000 tokens a second."""

RUNS_PER_S: Final = 0.4
LONGEST_DEADLINE_S: Final = 150.0
FASTER: Final = 2.0
"""Deadlines are so many times shorter than recorded; tools, too."""

TAIL_S: Final = 60.0
"""Play goes on for so long after the last arrival."""

_KIND: Final = "a100-80g"
"""What the simulator takes the core for; nothing of it is used."""


def real(folder: Path, *, runs: int, seed: int, profile: str = "cpu-tiny") -> Bed:
    """The bed, its fleet file in ``folder``. ``profile``: of the engines, for the simulator (`maestro calibrate` measures one).

    Raises `ConfigError` where no model is named.
    """
    path = os.environ.get(MODEL_PATH_ENV, "")
    if not Path(path, "config.json").is_file():
        raise ConfigError(
            f"{MODEL_PATH_ENV} must name the folder of a small model for vLLM: "
            "python serving/vllm_cpu/tiny_model.py DIR makes one (see docs/vllm-cpu.md)"
        )
    weights = size_bytes(weight_files(Path(path)))
    file = folder / "fleet.cpu-2models.toml"
    file.write_text(_fleet(Path(path).resolve(), weights), encoding="utf-8")
    config: dict[str, Any] = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
    return Bed(
        engine="vllm",
        label=label("vllm"),
        fleet=file,
        workload=workload(runs=runs, seed=seed),
        sim=lambda _file, policy, moves: sim_fleet(policy, moves, config, profile),
        arrivals_per_s=RUNS_PER_S,
        warm=tuple(reversed(MODELS)),
    )


def _fleet(model_path: Path, weight_bytes: int) -> str:
    memory = 2 * (CPU_SERVER_BYTES + weight_bytes) + KV_BYTES + KV_BYTES // 2
    gpu = f'[[gpu]]\nkind = "cpu"\nnode = "n1"\ncpu_core = 0\nmemory_gb = {memory / 1e9:.9f}\nmodels = {json.dumps(MODELS)}\n'
    return gpu + "".join(
        f"""
[[model]]
name = "{name}"
slots = {SLOTS}
max_model_len = {MAX_MODEL_LEN}
[model.launch]
kind = "vllm"
model_path = {json.dumps(str(model_path))}
kv_cache_memory_bytes = {KV_BYTES}
"""
        for name in MODELS
    )


def workload(*, runs: int, seed: int) -> Workload:
    """Recorded runs, each with one model for all of its calls: every third app has the first one, and those have most of the runs."""
    found = [
        r
        for r in sample().runs
        if r.deadline_s <= LONGEST_DEADLINE_S
        and all(s.prompt_tokens // PROMPTS + s.output_tokens < MAX_MODEL_LEN for s in r.stages)
    ]
    model_of = {app: MODELS[n % 3 > 0] for n, app in enumerate(sorted({r.app for r in found}))}
    window_s = runs / RUNS_PER_S
    return Workload(
        name="everything, 2 models",
        runs=arriving(
            found,
            lambda run, _: model_of[run.app],
            runs=runs,
            window_s=window_s,
            seed=seed,
            speed=FASTER,
            prompts=PROMPTS,
        ),
        warmup_s=window_s / 6,
        window_s=window_s,
        horizon_s=window_s + TAIL_S,
        source=f"{sample().source}; {runs} of {len(found)} runs that fit in order of seed {seed}; prompts {PROMPTS} times, "
        f"deadlines {FASTER:g} times shorter",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _OnCore(SimModel):
    """A model on a core: what it is there is known."""

    served: Served

    def on(self, gpu: Gpu, kv_bytes: int | None = None) -> Served:
        return self.served


def sim_fleet(policy: str, moves: Sequence[Move], config: dict[str, Any], profile: str) -> SimFleet:
    """The core for the simulator. Its KV memory is elastic there, so what does not fit is made not to fit by its weights.

    A server that has started once sleeps: bringing it takes what a wake was seen to take.
    """
    both = policy == "static"
    fixed = 0 if both else 10**9
    known = named_profile(profile)
    block_bytes = known.block_size * KvShape.from_config(config).bytes_per_token
    served = Served(
        model=Model(
            profile="cpu", name="cpu", parameters=fixed // 2, max_tokens=MAX_MODEL_LEN,
            layers=int(config["num_hidden_layers"]), config=config, source="its folder",
        ),
        gpu=gpus()[_KIND],
        tensor_parallel=1,
        weight_bytes=fixed,
        server_bytes=0,
        kv_bytes=KV_BYTES // (1 + both),
        profile=dataclasses.replace(
            known, max_num_seqs=SLOTS, max_model_len=MAX_MODEL_LEN, num_blocks=KV_BYTES // (1 + both) // block_bytes
        ),
        tiers=_tiers(moves),
        basis="derived",
        source=profile,
    )  # fmt: skip
    models = {
        name: _OnCore(name=name, model=served.model, slots=SLOTS, max_model_len=MAX_MODEL_LEN, served=served)
        for name in MODELS
    }
    gpu = SimGpu(gpu_id="n1.0", node_id="n1", cluster="local", kind=_KIND, usable_bytes=fixed + KV_BYTES)
    return SimFleet(
        clusters={"local": SimCluster(name="local")},
        nodes={"n1": SimNode(node_id="n1", cluster="local", gpus=(gpu.gpu_id,), host_ram_bytes=4 * fixed)},
        gpus={gpu.gpu_id: gpu},
        models=models,
        engines=tuple(
            SimEngine(
                spec=served.spec(f"{name}.{gpu.gpu_id}", model=name),
                profile=served.profile,
                gpus=(gpu.gpu_id,),
                served=served,
            )
            for name in (MODELS if both else MODELS[:1])
        ),
    )


def _tiers(moves: Sequence[Move]) -> Tiers:
    """As they were measured; half a second where none was."""

    def took_s(was: Tier, to: Tier) -> float:
        seen = [m.took_s for m in moves if (m.was, m.to) == (was, to) and not m.error]
        return statistics.fmean(seen) if seen else 0.5

    wake_s, sleep_s = took_s("sleeping", "gpu"), took_s("gpu", "sleeping")
    return Tiers(
        from_sleeping_s=wake_s,
        reload_s=wake_s,
        from_host_s=wake_s,
        from_disk_s=wake_s,
        from_remote_s=wake_s,
        to_sleeping_s=sleep_s,
        discard_s=sleep_s,
        basis="derived",
        source="measured in the play beside it",
    )
