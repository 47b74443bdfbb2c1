"""GPUs, models, and what they take: engine profiles, KV memory and weight tiers; and the fleets made of them.

The numbers are data, each with its source, in ``profiles/*.toml``. A step of a model on so many GPUs takes

    overhead + weights / bandwidth + 2 x layers x all_reduce           (``base_s``; the reductions with tensor parallelism only)
    + decoding requests x (sequence + 2 x parameters / flops)          (``decode_s_per_seq``)
    + tokens of KV that they read x KV bytes / bandwidth               (``kv_read_s_per_token``)
    + prefill tokens x 2 x parameters / flops                          (``prefill_s_per_token``)

with bytes and flops shared by the GPUs of the engine, and bandwidth and flops as far as vLLM reaches them. What it leaves out:
attention's own arithmetic in long prompts, and that reductions of large prefills take longer.

``basis`` says how well a number stands: ``published`` (somebody measured this very thing; `Served.off` says how far the profile
is from it) or ``derived`` (from published numbers of other things, by the formula above).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

from maestro_agents.core import EngineSpec
from maestro_agents.errors import ConfigError
from maestro_agents.fleet import FleetTables, GpuPlace, GpuTable, ModelTable, load_tables
from maestro_agents.predict.memory import BLOCK_TOKENS, KvShape
from maestro_agents.simulator.calibration import read_calibration
from maestro_agents.simulator.engine import PROFILES, Engine, EngineProfile, EngineRequest
from maestro_agents.tenants import Tenant, with_residency
from maestro_agents.tomlfile import Place

Basis = Literal["published", "derived"]

SLOTS: Final = 256
"""Requests in a batch where nobody says (vLLM's ``--max-num-seqs`` for an API server)."""

_LEAST_KV: Final = 0.1
"""Share of the HBM that tensor parallelism, where nobody says it, leaves for KV at least."""

_BF16_BYTES: Final = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of GPU. ``flops`` in bfloat16, dense; what the other fields mean says ``profiles/gpus.toml``."""

    kind: str
    name: str
    hbm_mib: int
    bandwidth_bytes_per_s: float
    flops: float
    prefill_mfu: float
    step_tokens: int
    host_link_bytes_per_s: float
    host_memory_bytes_per_s: float
    basis: Basis
    source: str

    @property
    def usable_bytes(self) -> int:
        """HBM for weights, KV and what servers take besides."""
        return int(self.hbm_mib * 2**20 * _data("gpus")["memory"]["utilization"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One model, served in bfloat16."""

    profile: str
    name: str
    parameters: int
    max_tokens: int
    layers: int
    config: Mapping[str, Any]
    source: str

    @property
    def weight_bytes(self) -> int:
        """In all."""
        return self.parameters * _BF16_BYTES

    def kv(self, tensor_parallel: int = 1) -> KvShape:
        """Its KV memory on each of so many GPUs."""
        return KvShape.from_config(self.config, tensor_parallel=tensor_parallel, block_tokens=BLOCK_TOKENS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiers:
    """Seconds to bring a model's weights to its GPUs from where they are, and to take them away."""

    #: The process lives, weights in pinned host memory (vLLM's sleep level 1).
    from_sleeping_s: float
    #: The process lives, weights dropped (level 2), their files on the node.
    reload_s: float
    #: A server starts; its files are in the page cache, on the node's disk, on another machine.
    from_host_s: float
    from_disk_s: float
    from_remote_s: float
    #: Level 1.
    to_sleeping_s: float
    #: Level 2, or the end of the process.
    discard_s: float
    basis: Basis
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A model on GPUs of one kind."""

    model: Model
    gpu: Gpu
    tensor_parallel: int
    #: Of each GPU: the engine's part of the weights, what its server takes besides, and its KV memory.
    weight_bytes: int
    server_bytes: int
    kv_bytes: int
    profile: EngineProfile
    tiers: Tiers
    basis: Basis
    source: str
    #: How far the profile is from what was published of this very thing: (what, relative difference).
    off: tuple[tuple[str, float], ...] = ()

    def spec(self, engine_id: str, *, model: str = "", cluster: str = "local", rtt_s: float = 0.0) -> EngineSpec:
        """As the scheduler sees the engine. Cold-start speeds: a prompt token, and a step with half of the slots decoding."""
        half = self.profile.max_num_seqs // 2 or 1
        spec = EngineSpec(
            engine_id=engine_id,
            url=f"sim://{engine_id}",
            model=model or self.model.profile,
            slots=self.profile.max_num_seqs,
            kv_bytes=self.kv_bytes,
            cluster=cluster,
            rtt_s=rtt_s,
            max_model_len=self.profile.max_model_len,
            prefill_s_per_token=self.profile.prefill_s_per_token,
            decode_s_per_token=self.profile.base_s + half * self.profile.decode_s_per_seq,
        )
        return self.model.kv(self.tensor_parallel).on(spec)


# -- the data ----------------------------------------------------------------------------------------------------------
@functools.cache
def _data(name: str) -> Mapping[str, Any]:
    file = resources.files("maestro_agents.simulator") / "profiles" / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


@functools.cache
def gpus() -> Mapping[str, Gpu]:
    """By kind, e.g. ``a100-80g``."""
    return {kind: Gpu(kind=kind, **table) for kind, table in _data("gpus")["gpu"].items()}


@functools.cache
def models() -> Mapping[str, Model]:
    """By profile, e.g. ``llama-3.1-8b``."""
    return {
        profile: Model(profile=profile, layers=table["config"]["num_hidden_layers"], **table)
        for profile, table in _data("models").items()
    }


def published(kind: Literal["step", "run"]) -> Sequence[Mapping[str, Any]]:
    """What others measured: decode steps, or whole benchmark runs (``profiles/published.toml``)."""
    return _data("published")[kind]


def server_bytes() -> int:
    """What a vLLM server takes of each of its GPUs besides weights and KV."""
    return int(_data("gpus")["memory"]["engine_bytes"])


# -- the formula -------------------------------------------------------------------------------------------------------
def serve(
    model: Model, gpu: Gpu, *, tensor_parallel: int = 0, kv_bytes: int | None = None, slots: int = SLOTS
) -> Served:
    """What a model is on GPUs of a kind.

    ``tensor_parallel`` 0: as few GPUs as leave a tenth of their memory for KV. ``kv_bytes`` (of each GPU) None: all that is
    left. Raises `ConfigError` where weights or KV do not fit.
    """
    tp = tensor_parallel or needed_tensor_parallel(model, gpu)
    weight_bytes = -(-model.weight_bytes // tp)
    shape = model.kv(tp)
    left = gpu.usable_bytes - weight_bytes - server_bytes()
    kv_bytes = left if kv_bytes is None else kv_bytes
    blocks = kv_bytes // (BLOCK_TOKENS * shape.bytes_per_token)
    if kv_bytes > left or blocks < 1:
        raise ConfigError(
            f"{model.profile} ({model.weight_bytes / 1e9:.0f} GB) on {tp} x {gpu.kind} leaves {max(0, left) / 1e9:.1f} GB "
            f"of each GPU for KV, {max(kv_bytes, 0) / 1e9:.1f} GB are asked for: more GPUs to a model (tensor_parallel), "
            "fewer models to a GPU, or larger GPUs"
        )
    basis, source = _standing(model, gpu, tp)
    served = Served(
        model=model,
        gpu=gpu,
        tensor_parallel=tp,
        weight_bytes=weight_bytes,
        server_bytes=server_bytes(),
        kv_bytes=blocks * BLOCK_TOKENS * shape.bytes_per_token,
        profile=_profile(model, gpu, tp, blocks, slots),
        tiers=tiers(model, gpu, tp),
        basis=basis,
        source=source,
    )
    return dataclasses.replace(served, off=tuple(_off(served)))


def needed_tensor_parallel(model: Model, gpu: Gpu) -> int:
    """As few GPUs as leave a tenth of their memory for KV. Raises `ConfigError` where eight are too few."""
    for tp in (1, 2, 4, 8):
        left = gpu.usable_bytes - model.weight_bytes / tp - server_bytes()
        if left >= _LEAST_KV * gpu.hbm_mib * 2**20:
            return tp
    raise ConfigError(f"{model.profile} ({model.weight_bytes / 1e9:.0f} GB) does not fit eight {gpu.kind}: larger GPUs")


def _profile(model: Model, gpu: Gpu, tp: int, blocks: int, slots: int) -> EngineProfile:
    step = _data("gpus")["step"]
    bandwidth = gpu.bandwidth_bytes_per_s * step["bandwidth_efficiency"]
    token_s = 2 * model.parameters / tp / gpu.flops
    reductions = 2 * model.layers if tp > 1 else 0
    return EngineProfile(
        base_s=step["overhead_s"] + model.weight_bytes / tp / bandwidth + reductions * step["all_reduce_s"],
        prefill_s_per_token=token_s / gpu.prefill_mfu,
        decode_s_per_seq=step["sequence_s"] + token_s / step["decode_mfu"],
        kv_read_s_per_token=model.kv(tp).bytes_per_token / bandwidth,
        max_num_seqs=slots,
        step_tokens=max(gpu.step_tokens, slots),
        block_size=BLOCK_TOKENS,
        num_blocks=blocks,
        max_model_len=min(model.max_tokens, blocks * BLOCK_TOKENS),
    )


def named_profile(name: str) -> EngineProfile:
    """By the name that a fleet file or a command line uses: ``cpu-tiny``, ``gpu``, ``MODEL@GPU`` as in the data files, or a
    file that `maestro calibrate` wrote (it ends in ``.toml``).

    Raises `ConfigError` where there is none.
    """
    if name.endswith(".toml"):
        return read_calibration(Path(name)).profile
    if name in PROFILES:
        return PROFILES[name]
    model, _, gpu = name.partition("@")
    if model not in models() or gpu not in gpus():
        raise ConfigError(
            f"there is no profile {name!r}: known are {', '.join(PROFILES)}, and MODEL@GPU with a model of "
            f"{', '.join(models())} and a GPU of {', '.join(gpus())}"
        )
    return serve(models()[model], gpus()[gpu]).profile


def step_s(profile: EngineProfile, *, decoding: int, context_tokens: float, prefill_tokens: int = 0) -> float:
    """Seconds of a step with so many requests decoding, of so many tokens each."""
    return (
        profile.base_s
        + prefill_tokens * profile.prefill_s_per_token
        + decoding * (profile.decode_s_per_seq + context_tokens * profile.kv_read_s_per_token)
    )


def burst_tokens_per_s(profile: EngineProfile, *, requests: int, prompt_tokens: int, output_tokens: int) -> float:
    """Tokens per second, prompt and answer, of so many equal requests that all come at once (``vllm bench serve``)."""
    engine = Engine(profile)
    for n in range(requests):
        engine.submit(EngineRequest(request_id=str(n), prompt_tokens=prompt_tokens, output_tokens=output_tokens), 0.0)
    end_s = 0.0
    while engine.wake_at_s < math.inf:
        end_s = max([end_s, *(record.ended_at_s for record in engine.step(engine.wake_at_s).ended)])
    return requests * (prompt_tokens + output_tokens) / end_s


def _about(entry: Mapping[str, Any], model: Model, gpu: Gpu, tp: int) -> bool:
    return (entry["model"], entry["gpu"], entry["tensor_parallel"]) == (model.profile, gpu.kind, tp)


def _standing(model: Model, gpu: Gpu, tp: int) -> tuple[Basis, str]:
    seen = [entry["source"] for kind in ("step", "run") for entry in published(kind) if _about(entry, model, gpu, tp)]
    if seen:
        return "published", "; ".join(dict.fromkeys(seen))
    return (
        "derived",
        f"the formula of simulator/hardware.py with {gpu.name}: {gpu.source}; steps: {_data('gpus')['step']['source']}",
    )


def _off(served: Served) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for entry in published("step"):
        if _about(entry, served.model, served.gpu, served.tensor_parallel):
            for decoding, seconds in zip(entry["decoding"], entry["seconds"], strict=True):
                own_s = step_s(served.profile, decoding=decoding, context_tokens=entry["context_tokens"])
                found.append((f"step of {decoding} decoding requests", own_s / seconds - 1))
    return found


def tiers(model: Model, gpu: Gpu, tensor_parallel: int) -> Tiers:
    """How long this model's weights take between the tiers."""
    data = _data("tiers")
    sleep, start = data["sleep"], data["start"]
    part_s = model.weight_bytes / tensor_parallel / gpu.host_link_bytes_per_s
    copy_s = sleep["overhead_s"] + max(part_s, model.weight_bytes / gpu.host_memory_bytes_per_s)
    found = Tiers(
        from_sleeping_s=copy_s,
        reload_s=sleep["overhead_s"] + model.weight_bytes / start["disk_bytes_per_s"],
        from_host_s=start["start_s"] + model.weight_bytes / start["host_bytes_per_s"],
        from_disk_s=start["start_s"] + model.weight_bytes / start["disk_bytes_per_s"],
        from_remote_s=start["start_s"] + model.weight_bytes / start["remote_bytes_per_s"],
        to_sleeping_s=copy_s,
        discard_s=sleep["discard_s"],
        basis="derived",
        source=f"weights / bandwidth: {sleep['source']}; {start['source']}; {gpu.name}: {gpu.source}",
    )
    for entry in data["seen"]:
        if _about(entry, model, gpu, tensor_parallel):
            said = {key: value for key, value in entry.items() if key.endswith("_s")}
            return dataclasses.replace(found, **said, basis="published", source=f"{entry['source']}; the rest derived")
    return found


# -- fleets ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class SimCluster:
    """Nodes behind one network distance."""

    name: str
    #: Seconds to there and back.
    rtt_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SimNode:
    """A machine with GPUs of one kind."""

    node_id: str
    cluster: str
    gpus: tuple[str, ...]
    #: Host memory for the weights of sleeping models.
    host_ram_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SimGpu:
    """One emulated GPU."""

    gpu_id: str
    node_id: str
    cluster: str
    #: "" where nobody named the GPU of a live engine: then it holds that engine and no other.
    kind: str
    #: For weights, KV and servers.
    usable_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SimModel:
    """A model as the workload names it."""

    name: str
    model: Model
    slots: int = SLOTS
    #: 0: as few GPUs as leave a tenth of their memory for KV.
    tensor_parallel: int = 0
    #: Longest prompt + output, where its owner bounds it; 0: as long as the model can.
    max_model_len: int = 0
    #: Clusters in which it may run; empty: all.
    allow_clusters: tuple[str, ...] = ()

    def may_run(self, cluster: str) -> bool:
        """Its engines may be made there."""
        return not self.allow_clusters or cluster in self.allow_clusters

    def on(self, gpu: Gpu, kv_bytes: int | None = None) -> Served:
        """On GPUs of a kind, with so much KV memory on each. Raises `ConfigError` where it does not fit."""
        served = serve(self.model, gpu, tensor_parallel=self.tensor_parallel, kv_bytes=kv_bytes, slots=self.slots)
        if not self.max_model_len:
            return served
        length = min(self.max_model_len, served.profile.max_model_len)
        return dataclasses.replace(served, profile=dataclasses.replace(served.profile, max_model_len=length))


@dataclass(frozen=True, kw_only=True, slots=True)
class SimEngine:
    """An engine that runs at the start."""

    spec: EngineSpec
    profile: EngineProfile
    #: Where it runs; several with tensor parallelism.
    gpus: tuple[str, ...] = ()
    #: None for an engine of a live fleet, of which only the profile is known: it stays where it is.
    served: Served | None = None


@dataclass(frozen=True, kw_only=True)
class SimFleet:
    """What a fleet file says to the simulator."""

    pool: str = "default"
    clusters: Mapping[str, SimCluster] = field(default_factory=dict[str, SimCluster])
    nodes: Mapping[str, SimNode] = field(default_factory=dict[str, SimNode])
    gpus: Mapping[str, SimGpu] = field(default_factory=dict[str, SimGpu])
    #: Those that run at the start, and those that may be brought.
    models: Mapping[str, SimModel] = field(default_factory=dict[str, SimModel])
    engines: tuple[SimEngine, ...] = ()
    tenants: tuple[Tenant, ...] = ()


def load_sim_fleet(path: str | Path) -> SimFleet:
    """Read a fleet file for the simulator: emulated GPUs (``[[gpu]]``), or the engines of a live fleet, each on a GPU of its own.

    Raises `ConfigError`, one line, with the line of the file.
    """
    tables = load_tables(path)
    clusters = {table.name: SimCluster(name=table.name, rtt_s=table.rtt_s) for table in tables.clusters}
    for name in [table.cluster for table in tables.gpus] + [spec.cluster for spec in tables.live.engines]:
        clusters.setdefault(name, SimCluster(name=name))
    if tables.gpus:
        return _of_gpus(tables, clusters)
    return _of_engines(tables, clusters)


def _of_engines(tables: FleetTables, clusters: Mapping[str, SimCluster]) -> SimFleet:
    """A live fleet: what its engines are is known where they are emulated."""
    nodes: dict[str, SimNode] = {}
    found: dict[str, SimGpu] = {}
    engines: list[SimEngine] = []
    for n, spec in enumerate(tables.live.engines):
        place: Place = ("engine", n)
        launch = tables.live.launches.get(spec.engine_id)
        if launch is None or launch.kind != "emulator":
            raise tables.file.error(
                place,
                f"how fast is engine {spec.engine_id!r}? The simulator needs GPUs ([[gpu]] with kind, count and models), or "
                'an emulated engine ([engine.launch] with kind = "emulator" and a profile)',
            )
        try:
            profile = named_profile(launch.profile)
        except ConfigError as e:
            raise tables.file.error((*place, "launch", "profile"), str(e)) from None
        profile = dataclasses.replace(profile, max_num_seqs=min(profile.max_num_seqs, spec.slots))
        known = dataclasses.replace(
            spec,
            slots=profile.max_num_seqs,
            max_model_len=spec.max_model_len or profile.max_model_len,
            kv_bytes=spec.kv_bytes or profile.kv_tokens * spec.kv_bytes_per_token,
            kv_block_tokens=profile.block_size,
            prefill_s_per_token=profile.prefill_s_per_token,
            decode_s_per_token=profile.base_s + profile.max_num_seqs // 2 * profile.decode_s_per_seq,
        )
        node_id = f"{spec.cluster}.{n}"
        gpu_id = f"{node_id}.0"
        nodes[node_id] = SimNode(node_id=node_id, cluster=spec.cluster, gpus=(gpu_id,))
        found[gpu_id] = SimGpu(
            gpu_id=gpu_id, node_id=node_id, cluster=spec.cluster, kind="", usable_bytes=known.kv_bytes
        )
        engines.append(SimEngine(spec=known, profile=profile, gpus=(gpu_id,)))
    return SimFleet(pool=tables.live.pool, clusters=clusters, nodes=nodes, gpus=found, engines=tuple(engines))


def _of_gpus(tables: FleetTables, clusters: Mapping[str, SimCluster]) -> SimFleet:
    known = sim_models(tables)
    nodes: dict[str, SimNode] = {}
    found: dict[str, SimGpu] = {}
    engines: list[SimEngine] = []
    for n, table in enumerate(tables.gpus):
        if table.kind not in gpus():
            raise tables.file.error(("gpu", n, "kind"), f"unknown GPU {table.kind!r}: known are {', '.join(gpus())}")
        if len(set(table.models)) < len(table.models):
            raise tables.file.error(("gpu", n, "models"), "a model is named twice: each runs once on a GPU")
        for name in table.models:
            if name not in known:
                raise tables.file.error(
                    ("gpu", n, "models"),
                    f"unknown model {name!r}: add [[model]] with name = {name!r} and a profile, or name one of {', '.join(models())}",
                )
        for place in (p for p in tables.places if p.table == n):
            node = _node(table, place, nodes.get(place.node_id))
            nodes[node.node_id] = node
            for gpu_id in place.gpus:
                found[gpu_id] = SimGpu(
                    gpu_id=gpu_id,
                    node_id=node.node_id,
                    cluster=node.cluster,
                    kind=table.kind,
                    usable_bytes=gpus()[table.kind].usable_bytes,
                )
            try:
                engines += _at_start(table, place.gpus, known, clusters[table.cluster].rtt_s)
            except ConfigError as e:
                raise tables.file.error(("gpu", n, "models"), str(e)) from None
    for n, described in enumerate(tables.models):
        allowed = [table for table in tables.gpus if described.may_run(table.cluster)]
        if not any(_fits(known[described.name], gpus()[table.kind], table.count) for table in allowed):
            raise tables.file.error(
                ("model", n),
                f"model {described.name!r} fits no GPU of this fleet (in its allow_clusters, if it has any): larger GPUs, or more "
                "of them in a node (count)",
            )
    tenants = tables.live.tenants
    return SimFleet(
        pool=tables.live.pool,
        clusters=clusters,
        nodes=nodes,
        gpus=found,
        models=known,
        engines=tuple(dataclasses.replace(e, spec=with_residency(e.spec, tenants)) for e in engines),
        tenants=tenants,
    )


def _fits(model: SimModel, gpu: Gpu, count: int) -> bool:
    try:
        return model.on(gpu).tensor_parallel <= count
    except ConfigError:
        return False


def sim_models(tables: FleetTables) -> dict[str, SimModel]:
    """The models that a file describes, and those that it uses by their profile's name. Raises `ConfigError`."""
    described = list(enumerate(tables.models))
    found: dict[str, SimModel] = {}
    for n, table in described:
        if table.name in found:
            raise tables.file.error(("model", n, "name"), f"model {table.name!r} is described twice")
        found[table.name] = sim_model(tables, n)
    for table in tables.gpus:
        for name in table.models:
            if name in models():
                found.setdefault(name, SimModel(name=name, model=models()[name]))
    return found


def sim_model(tables: FleetTables, n: int) -> SimModel:
    """The n-th [[model]] of a file. Raises `ConfigError` where it has no profile that is known."""
    table: ModelTable = tables.models[n]
    if table.profile not in models():
        raise tables.file.error(
            ("model", n, "profile"), f"unknown profile {table.profile!r}: known are {', '.join(models())}"
        )
    model = models()[table.profile]
    try:
        model.kv(table.tensor_parallel or 1)
    except ConfigError as e:
        raise tables.file.error(("model", n, "tensor_parallel"), str(e)) from None
    return SimModel(
        name=table.name,
        model=model,
        slots=table.slots or SLOTS,
        tensor_parallel=table.tensor_parallel,
        max_model_len=table.max_model_len,
        allow_clusters=tuple(table.allow_clusters),
    )


def _node(table: GpuTable, place: GpuPlace, before: SimNode | None) -> SimNode:
    """A node, or what a further table adds to it."""
    return SimNode(
        node_id=place.node_id,
        cluster=table.cluster,
        gpus=(*(before.gpus if before else ()), *place.gpus),
        host_ram_bytes=max(int(table.host_ram_gb * 1e9), before.host_ram_bytes if before else 0),
    )


def _at_start(table: GpuTable, gpu_ids: Sequence[str], known: Mapping[str, SimModel], rtt_s: float) -> list[SimEngine]:
    """The engines of a table on one node: every model on all of its GPUs, what is left of the HBM shared equally among them as KV."""
    gpu = gpus()[table.kind]
    alone = [known[name].on(gpu) for name in table.models]
    taken = sum(served.weight_bytes + served.server_bytes for served in alone)
    left = gpu.usable_bytes - taken
    if left <= 0:
        raise ConfigError(
            f"{' and '.join(table.models)} leave nothing of {gpu.usable_bytes / 1e9:.1f} GB for KV: fewer models to a GPU, "
            "or larger GPUs"
        )
    engines: list[SimEngine] = []
    for name, served in zip(table.models, alone, strict=True):
        tp = served.tensor_parallel
        if table.count % tp:
            raise ConfigError(
                f"{name} takes {tp} GPUs: count = {table.count} is no multiple of that: change count, or give the model in "
                "[[model]] another tensor_parallel"
            )
        there = known[name].on(gpu, left // len(alone))
        for first in range(0, table.count, tp):
            on = tuple(gpu_ids[first : first + tp])
            spec = there.spec(f"{name}.{on[0]}", model=name, cluster=table.cluster, rtt_s=rtt_s)
            engines.append(SimEngine(spec=spec, profile=there.profile, gpus=on, served=there))
    return engines
