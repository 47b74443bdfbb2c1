"""The GPU hosts of a fleet file: which engines a node can have, and what each takes of a GPU.

Of every GPU all models that fit it may run there, one engine for each, named ``model.gpu``; engines over several GPUs (tensor
parallelism) are where the file has them at the start, and share those GPUs with nobody.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from maestro_agents.core import EngineSpec
from maestro_agents.errors import ConfigError
from maestro_agents.fleet import FleetTables, GpuPlace, GpuTable, Launch, load_tables
from maestro_agents.simulator.hardware import Served, SimModel, gpus, server_bytes, sim_model, sim_models
from maestro_agents.tenants import with_residency
from maestro_agents.tomlfile import Place
from maestro_serving.drivers import Host, NodeEngine, NodeGpu
from maestro_serving.weights import size_bytes, weight_files

CPU_SERVER_BYTES: Final = 1_700_000_000
"""What a vLLM server on a CPU takes besides weights and KV memory (docs/vllm-cpu.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """A model of the file: its server, and its profile where it has one."""

    name: str
    place: Place
    #: As vLLM would serve it; None where it is emulated.
    spec: EngineSpec | None
    launch: Launch
    sim: SimModel | None


def load_host(path: Path, node_id: str, state: Path, *, elastic: bool = False) -> Host:
    """What a fleet file says of one node. ``state``: its folder. ``elastic``: kvcached is installed beside vLLM.

    Raises `ConfigError`, one line, with the line of the file.
    """
    tables = load_tables(path, this_node=node_id)
    if not tables.places:
        raise ConfigError(
            f"{path} has no [[gpu]]: a node's engines are made of its GPUs (serving/deploy/fleet.node-*.toml)"
        )
    if node_id not in tables.live.nodes:
        raise ConfigError(f"{path} has no node {node_id!r}: its nodes are {', '.join(tables.live.nodes)}")
    models = _models(tables)
    rtt_s = {c.name: c.rtt_s for c in tables.clusters}
    fits: set[str] = set()
    found: list[NodeGpu] = []
    engines: list[NodeEngine] = []
    at_start: list[str] = []
    for place in tables.places:
        table = tables.gpus[place.table]
        here = [_gpu(tables, place, gpu_id, state) for gpu_id in place.gpus]
        start = [models[name] for name in table.models if name in models]
        if len(start) < len(table.models):
            lost = next(name for name in table.models if name not in models)
            raise tables.file.error(
                ("gpu", place.table, "models"), f"unknown model {lost!r}: add [[model]] with name = {lost!r}"
            )
        made = list(_engines(tables, place, here, models, elastic=elastic))
        fits |= {e.spec.model for e in made}
        if place.node_id != node_id:
            continue
        found += here
        for e in made:
            spec = dataclasses.replace(e.spec, cluster=table.cluster, rtt_s=rtt_s.get(table.cluster, 0.0))
            engines.append(dataclasses.replace(e, spec=with_residency(spec, tables.live.tenants)))
        at_start += [e.engine_id for e in made if e.spec.model in table.models]
        _check_start(tables, place, here, made)
    for model in models.values():
        if model.name not in fits:
            raise tables.file.error(
                model.place,
                f"model {model.name!r} fits no GPU of this fleet (in its allow_clusters, if it has any): larger GPUs, a smaller "
                "kv_cache_memory_bytes, or the GPUs that it starts on ([[gpu]] models) where it takes several",
            )
    cluster = next(tables.gpus[p.table].cluster for p in tables.places if p.node_id == node_id)
    return Host(
        node_id=node_id,
        cluster=cluster,
        ram_bytes=_ram_bytes(tables, node_id, models),
        gpus=tuple(found),
        engines=tuple(engines),
        at_start=tuple(at_start),
    )


def _models(tables: FleetTables) -> Mapping[str, _Model]:
    found: dict[str, _Model] = {}
    for n, table in enumerate(tables.models):
        if table.name in found:
            raise tables.file.error(("model", n, "name"), f"model {table.name!r} is described twice")
        spec, launch = tables.launched(n)
        real = launch.kind == "vllm"
        sim = sim_model(tables, n) if table.profile or not real else None
        found[table.name] = _Model(
            name=table.name, place=("model", n), spec=spec if real else None, launch=launch, sim=sim
        )
        if real and not (launch.url or sim or _files(launch)):
            raise tables.file.error(
                ("model", n, "launch"),
                f"model {table.name!r}: how large is it? Give model_path, a folder with its safetensors, or the model a profile",
            )
        if launch.url and sum(table.name in gpu.models for gpu in tables.gpus) != 1:
            raise tables.file.error(
                ("model", n, "launch", "url"),
                f"model {table.name!r} is a server that runs: name it in the models of the one [[gpu]] where it does",
            )
    if all(t.profile for t in tables.models):  # else the simulator knows none of them
        for name, sim in sim_models(tables).items():
            found.setdefault(
                name, _Model(name=name, place=("gpu", 0), spec=None, launch=Launch(kind="emulator"), sim=sim)
            )
    return found


def _files(launch: Launch) -> tuple[Path, ...]:
    folder = Path(launch.model_path)
    return weight_files(folder) if launch.model_path and folder.is_dir() else ()


def _gpu(tables: FleetTables, place: GpuPlace, gpu_id: str, state: Path) -> NodeGpu:
    table, at = tables.gpus[place.table], ("gpu", place.table, "kind")
    kind = gpus().get(table.kind)
    if kind is None and not table.memory_gb:
        raise tables.file.error(
            at, f"unknown GPU {table.kind!r}: give its memory_gb too, or name one of {', '.join(gpus())}"
        )
    if kind is not None and table.memory_gb:
        raise tables.file.error(
            ("gpu", place.table, "memory_gb"), f"how large a {table.kind} is is known: leave it out"
        )
    index = int(gpu_id.rpartition(".")[2])
    memory_bytes = kind.hbm_mib * 2**20 if kind else int(table.memory_gb * 1e9)
    core = None
    if table.kind == "cpu":
        core = index if table.cpu_core is None else table.cpu_core + place.gpus.index(gpu_id)
        core %= os.cpu_count() or 1
    return NodeGpu(
        gpu_id=gpu_id,
        index=index,
        kind=table.kind,
        memory_bytes=memory_bytes,
        usable_bytes=kind.usable_bytes if kind else memory_bytes,
        cpu_core=core,
        state=state,
        kv_factor=table.kv_factor,
    )


def _engines(
    tables: FleetTables, place: GpuPlace, here: list[NodeGpu], models: Mapping[str, _Model], *, elastic: bool
) -> Iterator[NodeEngine]:
    """All engines that the GPUs of a place can have."""
    table = tables.gpus[place.table]
    barred = {m.name for m in tables.models if not m.may_run(table.cluster)}
    models = {name: model for name, model in models.items() if name not in barred}
    fixed: set[str] = set()
    for model in models.values():
        width = _width(model, table)
        if width > 1 and model.name in table.models:
            for first in range(0, len(here) - width + 1, width):
                group = here[first : first + width]
                if (e := _engine(model, group, elastic=elastic)) is not None:
                    fixed |= set(e.gpus)
                    yield dataclasses.replace(e, sleeps=False)
    for gpu in here:
        for model in models.values():
            adopted_elsewhere = model.launch.url and (model.name not in table.models or gpu is not here[0])
            if gpu.gpu_id in fixed or _width(model, table) != 1 or adopted_elsewhere:
                continue
            if (e := _engine(model, [gpu], elastic=elastic)) is not None:
                yield e


def _width(model: _Model, table: GpuTable) -> int:
    """GPUs that an engine of the model takes; 0 where it fits none of this kind."""
    if model.sim is None or table.kind not in gpus():
        return model.sim.tensor_parallel or 1 if model.sim else 1
    try:
        return model.sim.on(gpus()[table.kind]).tensor_parallel
    except ConfigError:
        return 0


def _engine(model: _Model, group: list[NodeGpu], *, elastic: bool) -> NodeEngine | None:
    """A model on these GPUs; None where it does not fit."""
    gpu = group[0]
    served = model.sim.on(gpus()[gpu.kind]) if model.sim and gpu.kind in gpus() else None
    engine_id = f"{model.name}.{gpu.gpu_id}"
    ids = tuple(g.gpu_id for g in group)
    if model.spec is None:
        return _emulated(model, served, engine_id, ids) if served else None
    files = _files(model.launch)
    whole = size_bytes(files) or (model.sim.model.weight_bytes if model.sim else 0)
    weight_bytes = -(-whole // len(group))
    taken = CPU_SERVER_BYTES if gpu.kind == "cpu" else server_bytes()
    left = gpu.usable_bytes - weight_bytes - taken
    kv_bytes = model.launch.kv_cache_memory_bytes or left
    spec = model.spec
    if model.sim is not None and spec.kv_bytes_per_token == 1:
        spec = model.sim.model.kv(len(group)).on(spec)
    floor = (
        spec.kv_bytes_of(spec.max_model_len, 0) if elastic and gpu.kind != "cpu" and spec.max_model_len else kv_bytes
    )
    if kv_bytes > left or kv_bytes <= 0 or floor > kv_bytes:
        return None
    return NodeEngine(
        spec=dataclasses.replace(spec, engine_id=engine_id, url=model.launch.url, kv_bytes=kv_bytes),
        gpus=ids,
        launch=model.launch,
        weight_bytes=weight_bytes,
        server_bytes=taken,
        kv_floor_bytes=floor,
        served=served,
        weight_files=files,
    )


def _emulated(model: _Model, served: Served, engine_id: str, ids: tuple[str, ...]) -> NodeEngine:
    spec = dataclasses.replace(served.spec(engine_id, model=model.name), url="")
    profile = served.profile
    floor = -(-profile.max_model_len // profile.block_size) * profile.block_size * spec.kv_bytes_per_token
    return NodeEngine(
        spec=spec,
        gpus=ids,
        launch=model.launch,
        weight_bytes=served.weight_bytes,
        server_bytes=served.server_bytes,
        kv_floor_bytes=floor,
        served=served,
    )


def _check_start(tables: FleetTables, place: GpuPlace, here: list[NodeGpu], made: list[NodeEngine]) -> None:
    """What runs at the start fits together."""
    table = tables.gpus[place.table]
    for gpu in here:
        there = [e for e in made if gpu.gpu_id in e.gpus and e.spec.model in table.models]
        need = sum(e.hbm_bytes + e.kv_floor_bytes for e in there)
        if need > gpu.usable_bytes:
            raise tables.file.error(
                ("gpu", place.table, "models"),
                f"{' and '.join(e.spec.model for e in there)} need {need / 1e9:.1f} GB, {gpu.gpu_id} has "
                f"{gpu.usable_bytes / 1e9:.1f} GB: fewer models at the start, a smaller max_model_len or "
                "kv_cache_memory_bytes, or larger GPUs",
            )


def _ram_bytes(tables: FleetTables, node_id: str, models: Mapping[str, _Model]) -> int:
    """As the file says; where it does not and models are real, what this machine has, and a tenth less."""
    of = [tables.gpus[p.table] for p in tables.places if p.node_id == node_id]
    said = max(int(table.host_ram_gb * 1e9) for table in of)
    if any("host_ram_gb" in table.model_fields_set for table in of) or all(m.spec is None for m in models.values()):
        return said
    return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
