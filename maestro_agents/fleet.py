"""fleet.toml: which engines there are, and which of them to launch.

    pool = "default"

    [redis]                                   # left out: `maestro up` starts an embedded one
    url = "redis://127.0.0.1:6379/0"

    [[engine]]
    id = "a"
    model = "tiny"
    url = "http://127.0.0.1:8101/v1"          # adopt a running server ...
    hints = "vllm"                            # how it is told of a call's place in line (docs/hints.md)

    [[engine]]
    id = "b"
    model = "tiny"
    [engine.launch]                           # ... or launch one; without url or port a free port is chosen
    kind = "emulator"

    [[cluster]]                               # left out: every cluster is near
    name = "local"
    rtt_s = 0.001                             # to there and back; left out: measured from each site (MAESTRO_SITE)

    [[tenant]]                                # left out: every tenant weighs the same, and has no limits
    name = "acme"                             # as apps say it (MAESTRO_TENANT, options), or as its gateway key does
    weight = 2.0                              # of its fair share
    allow_clusters = ["local"]                # its calls are served there and nowhere else
    max_stages = 32                           # at a time; 0 or left out: no limit
    max_kv_gb = 20.0                          # reserved at a time
    tokens_per_minute = 100000                # prompt and output
    max_waiting = 200                         # further ones are refused, with the moment to try again

A fleet that names GPUs instead of engines has its engines made of them: each model on each GPU that it fits. In the simulator
(`simulator.hardware.load_sim_fleet`), or live by node agents (``maestro node``), which move models between memory tiers:

    [[gpu]]
    kind = "a100-80g"                         # one of simulator/profiles/gpus.toml, or "cpu", or your own with memory_gb
    count = 4                                 # GPUs of a node
    nodes = 1
    node = "n1"                               # its name; left out: CLUSTER.NUMBER. Tables of one name are one node.
                                              # "*": any node whose agent says its name itself (maestro node --node)
    cluster = "local"
    host_ram_gb = 512                         # of a node, for the weights of sleeping models
    models = ["small"]                        # that run on each of them at the start; they share its memory
    # memory_gb = 3                           # where the kind does not say it; on "cpu" it is accounted, not physical
    # cpu_core = 0                            # "cpu": the core that its engines run on; the next GPU has the next core
    # ray_resource = "accelerator_type:H100" # `maestro up --ray`: what its machine has, by Ray's name (docs/ray.md)
    # kv_factor = 2                           # live: KV budgets may come to so many times what there is (docs/gpu-memory.md)

    [[model]]                                 # left out: `models` names profiles
    name = "small"                            # as the workload calls it
    profile = "llama-3.1-8b"                  # one of simulator/profiles/models.toml
    slots = 24                                # requests in a batch
    max_model_len = 8192                      # left out: as long as the model can
    tensor_parallel = 1                       # left out: as many GPUs as it needs
    allow_clusters = ["local"]                # its engines are made there and nowhere else; left out: everywhere
    [model.launch]                            # live; left out: an emulator
    kind = "vllm"
    model_path = "models/small"

Every error is one line that begins with ``fleet.toml:LINE:`` and says what to do.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from maestro_agents.core import EngineSpec
from maestro_agents.errors import ConfigError
from maestro_agents.hints import DIALECTS
from maestro_agents.predict.memory import BLOCK_TOKENS, KvShape
from maestro_agents.redis_url import check_redis_url, without_password
from maestro_agents.tenants import Tenant, with_residency
from maestro_agents.tomlfile import Place, TomlFile, read_toml

_NAME: Final = r"^[A-Za-z0-9_.-]+$"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start one engine's server."""

    kind: Literal["emulator", "vllm"]
    #: 0: a free port is chosen.
    port: int = 0
    #: Folder or Hugging Face name that vLLM loads.
    model_path: str = ""
    #: Passed through to the server's command line.
    args: tuple[str, ...] = ()
    #: The emulator's timing.
    profile: str = "cpu-tiny"
    #: 0: the server's own default.
    kv_cache_memory_bytes: int = 0
    #: Bind the server to one CPU core; None: do not.
    cpu_core: int | None = None
    #: A server of a [[model]] that runs already, and is taken as it is.
    url: str = ""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What a fleet file says. An engine that is to be launched on a port yet to be chosen has ``url == ""``."""

    pool: str = "default"
    redis_url: str | None = None
    engines: tuple[EngineSpec, ...] = ()
    #: By engine id.
    launches: Mapping[str, Launch] = field(default_factory=dict[str, Launch])
    #: Nodes whose agents make the engines, and the file that says of what.
    nodes: tuple[str, ...] = ()
    file: Path | None = None
    tenants: tuple[Tenant, ...] = ()

    def adopt(self, urls: Mapping[str, str]) -> Fleet:
        """The same fleet with the URLs (by engine id) at which its launched engines were found to listen."""
        engines = tuple(dataclasses.replace(e, url=urls.get(e.engine_id, e.url)) for e in self.engines)
        return dataclasses.replace(self, engines=engines)

    def running(self) -> tuple[EngineSpec, ...]:
        """All engines; raises `ConfigError` where one has no address yet."""
        homeless = [e.engine_id for e in self.engines if not e.url]
        if homeless:
            raise ConfigError(
                f"engine {homeless[0]!r} is to be launched and has no address yet: start the fleet with "
                "`maestro up`, or give the engine a url (or launch.port) and start it yourself"
            )
        return self.engines


def load_fleet(path: str | Path) -> Fleet:
    """Read a fleet file. Of [[gpu]] it says the nodes; their engines are known once these run. Raises `ConfigError`, one line,
    with the line of the file.
    """
    return load_tables(path).live


def load_tables(path: str | Path, *, this_node: str = "") -> FleetTables:
    """Read all tables of a fleet file. ``this_node``: who the tables of node "*" are about, unless they name it; else they are
    left out. Raises `ConfigError`, one line, with the line of the file.
    """
    if not Path(path).exists():
        raise ConfigError(
            f"{path}: there is no such file: name another, or write one with an [[engine]] (id, model, url)"
        )
    file = read_toml(Path(path))
    try:
        body = _File.model_validate(dict(file.content))
    except ValidationError as e:
        raise _explain(e, file) from None
    if body.engine and body.gpu:
        raise file.error(("gpu", 0), "a fleet has either [[engine]] or [[gpu]]: engines are made of [[gpu]]")
    if not body.engine and not body.gpu:
        raise file.error((), "the fleet has no engine: add an [[engine]] with id, model and url")
    _check_clusters(body, file)
    _check_models(body, file)
    gpus = _about(body.gpu, this_node)
    places = _places(gpus, file)
    seen: dict[str, int] = {}
    for n, engine in enumerate(body.engine):
        place: Place = ("engine", n)
        if engine.id in seen:
            raise file.error(
                (*place, "id"), f"engine id {engine.id!r} is taken by line {seen[engine.id]}: ids are unique in a fleet"
            )
        seen[engine.id] = file.line((*place, "id"))
        if not engine.url and engine.launch is None:
            raise file.error(
                place,
                f"engine {engine.id!r} has neither url nor launch: give the url of a running server or [engine.launch]",
            )
    rtt_s = {cluster.name: cluster.rtt_s for cluster in body.cluster}
    tenants = _tenants(body, file)
    engines = tuple(
        with_residency(dataclasses.replace(_spec(e, file, ("engine", n)), rtt_s=rtt_s.get(e.cluster, 0.0)), tenants)
        for n, e in enumerate(body.engine)
    )
    launches = {e.id: _launch(e.launch, file) for e in body.engine if e.launch is not None}
    live = Fleet(
        pool=body.pool,
        redis_url=body.redis and body.redis.url,
        engines=engines,
        launches=launches,
        nodes=tuple(dict.fromkeys(place.node_id for place in places)),
        file=file.path if body.gpu else None,
        tenants=tenants,
    )
    return FleetTables(file=file, live=live, clusters=body.cluster, gpus=gpus, models=body.model, places=places)


def write_fleet(fleet: Fleet, path: Path) -> None:
    """Write a fleet of running engines so that `load_fleet` reads it back, launches left out."""
    lines = [f"pool = {json.dumps(fleet.pool)}"]
    if fleet.redis_url:
        lines += ["", "[redis]", f"url = {json.dumps(fleet.redis_url)}"]
    if any(e.rtt_s for e in fleet.engines):
        for name, rtt_s in {e.cluster: e.rtt_s for e in fleet.engines}.items():
            lines += ["", "[[cluster]]", f"name = {json.dumps(name)}", f"rtt_s = {rtt_s}"]
    for e in fleet.running():
        lines += ["", "[[engine]]", f"id = {json.dumps(e.engine_id)}"]
        keys = (
            "model",
            "url",
            "served_model",
            "slots",
            "gpus",
            "kv_bytes",
            "kv_bytes_per_token",
            "kv_block_tokens",
            "kv_window_tokens",
            "kv_window_bytes_per_token",
            "api_key_env",
            "cluster",
            "max_model_len",
            "hints",
        )
        lines += [f"{key} = {json.dumps(getattr(e, key))}" for key in keys]
    for t in fleet.tenants:
        said = {k: v for k, v in t.encode().items() if v and k not in ("max_kv_bytes", "allow_clusters")}
        lines += ["", "[[tenant]]", *(f"{key} = {json.dumps(value)}" for key, value in said.items())]
        if t.allow_clusters:
            lines.append(f"allow_clusters = {json.dumps(t.allow_clusters)}")
        if t.max_kv_bytes:
            lines.append(f"max_kv_gb = {t.max_kv_bytes / 1e9:.9f}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# -- the file's shape --------------------------------------------------------------------------------------------------
def _check_engine_url(url: str) -> str:
    parts = urlsplit(url)
    if url and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ValueError("an engine's url looks like http://127.0.0.1:8101/v1")
    return url.rstrip("/")


def _check_dialect(name: str) -> str:
    if name not in DIALECTS:
        raise ValueError(f"nobody speaks it: engines are told hints as one of {', '.join(DIALECTS)}")
    return name


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Redis(_Table):
    url: Annotated[str, AfterValidator(check_redis_url)]


class _LaunchCommon(_Table):
    kind: Literal["emulator", "vllm"]
    port: int = Field(default=0, ge=0, le=65535)
    model_path: str = ""
    args: list[str] = []
    kv_cache_memory_bytes: NonNegativeInt = 0


class _LaunchTable(_LaunchCommon):
    profile: str = "cpu-tiny"
    cpu_core: NonNegativeInt | None = None


class _ModelLaunchTable(_LaunchCommon):
    url: Annotated[str, AfterValidator(_check_engine_url)] = ""


class _Engine(_Table):
    id: str = Field(min_length=1, max_length=64, pattern=_NAME)
    model: str = Field(min_length=1)
    url: Annotated[str, AfterValidator(_check_engine_url)] = ""
    served_model: str = ""
    slots: PositiveInt = 16
    gpus: NonNegativeInt = 0
    kv_tokens: NonNegativeInt = 0
    kv_bytes: NonNegativeInt = 0
    kv_bytes_per_token: NonNegativeInt = 0
    kv_block_tokens: NonNegativeInt = 0
    kv_window_tokens: NonNegativeInt = 0
    kv_window_bytes_per_token: NonNegativeInt = 0
    api_key_env: str = ""
    hints: Annotated[str, AfterValidator(_check_dialect)] = "vllm"
    cluster: str = "local"
    max_model_len: NonNegativeInt = 0
    launch: _LaunchTable | None = None


class ClusterTable(_Table):
    """``[[cluster]]``: how far a cluster is."""

    name: str = Field(min_length=1, max_length=64, pattern=_NAME)
    rtt_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class GpuTable(_Table):
    """``[[gpu]]``: nodes with GPUs of one kind."""

    kind: str = Field(min_length=1)
    count: PositiveInt = 1
    nodes: PositiveInt = 1
    node: str = Field(default="", max_length=64, pattern=r"^([A-Za-z0-9_.-]*|\*)$")
    cluster: str = Field(default="local", min_length=1, max_length=64, pattern=_NAME)
    host_ram_gb: float = Field(default=512.0, ge=0, allow_inf_nan=False)
    models: list[str] = []
    memory_gb: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    kv_factor: float = Field(default=1.0, ge=1, le=3.05, allow_inf_nan=False)
    cpu_core: NonNegativeInt | None = None
    ray_resource: str = Field(default="", max_length=64, pattern=r"^[A-Za-z0-9_.:-]*$")


class ModelTable(_Table):
    """``[[model]]``: a name that programs use, and what it is."""

    name: str = Field(min_length=1)
    profile: str = ""
    slots: NonNegativeInt = 0
    tensor_parallel: NonNegativeInt = 0
    max_model_len: NonNegativeInt = 0
    allow_clusters: list[str] = []
    launch: _ModelLaunchTable | None = None

    def may_run(self, cluster: str) -> bool:
        """Its engines may be made there."""
        return not self.allow_clusters or cluster in self.allow_clusters


class TenantTable(_Table):
    """``[[tenant]]``: what its calls may take (`tenants.Tenant`)."""

    name: str = Field(min_length=1, max_length=128)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    allow_clusters: list[str] = []
    max_stages: NonNegativeInt = 0
    max_kv_gb: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    tokens_per_minute: NonNegativeInt = 0
    max_waiting: NonNegativeInt = 0


class _File(_Table):
    pool: str = Field(default="default", min_length=1, max_length=64, pattern=_NAME)
    redis: _Redis | None = None
    engine: list[_Engine] = []
    cluster: list[ClusterTable] = []
    gpu: list[GpuTable] = []
    model: list[ModelTable] = []
    tenant: list[TenantTable] = []


@dataclass(frozen=True, kw_only=True)
class GpuPlace:
    """GPUs of a ``[[gpu]]`` table (its number) on one node."""

    table: int
    node_id: str
    gpus: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FleetTables:
    """All of a fleet file: ``live`` is what it says of engines."""

    file: TomlFile
    live: Fleet
    clusters: Sequence[ClusterTable]
    gpus: Sequence[GpuTable]
    models: Sequence[ModelTable]
    #: Where the GPUs are, in the order of the file.
    places: Sequence[GpuPlace]

    def launched(self, n: int) -> tuple[EngineSpec, Launch]:
        """How the server of the n-th [[model]] is started, and the engine that it then is, for every GPU alike (it has neither
        id nor URL yet). Raises `ConfigError` where the folder that it names holds no model.
        """
        table = self.models[n]
        said = table.launch or _ModelLaunchTable(kind="emulator")
        launch = _LaunchTable(**said.model_dump(exclude={"url"}))
        engine = _Engine(
            id="model", model=table.name, slots=table.slots or 16, max_model_len=table.max_model_len, launch=launch
        )
        found = dataclasses.replace(_launch(launch, self.file), url=said.url)
        return _spec(engine, self.file, ("model", n)), found


def _explain(error: ValidationError, file: TomlFile) -> ConfigError:
    found = error.errors(include_url=False)
    first = min(found, key=lambda e: e["type"] != "extra_forbidden")  # a misspelled key also shows as a missing one
    place = tuple(first["loc"])
    name = str(place[-1]) if place else "the file"
    match first["type"]:
        case "extra_forbidden":
            known = _KEYS.get(tuple(p for p in place[:-1] if isinstance(p, str)), {})
            return file.error(place, f"unknown key {name!r}: known here are {', '.join(known)}")
        case "missing":
            return file.error(
                place, f"{'.'.join(str(p) for p in place if isinstance(p, str))} is missing: add {name} = …"
            )
        case _:
            problem = first["msg"].removeprefix("Value error, ")
            value = without_password(repr(first["input"]))
            return file.error(place, f"{name} = {value}: {problem[:1].lower()}{problem[1:]}")


_KEYS: Final[Mapping[tuple[str, ...], Mapping[str, Any]]] = {
    (): _File.model_fields,
    ("redis",): _Redis.model_fields,
    ("engine",): _Engine.model_fields,
    ("engine", "launch"): _LaunchTable.model_fields,
    ("cluster",): ClusterTable.model_fields,
    ("gpu",): GpuTable.model_fields,
    ("model",): ModelTable.model_fields,
    ("model", "launch"): _ModelLaunchTable.model_fields,
    ("tenant",): TenantTable.model_fields,
}


def _check_clusters(body: _File, file: TomlFile) -> None:
    """Each cluster is described once; where any is, all that are named are."""
    described = [cluster.name for cluster in body.cluster]
    for n, name in enumerate(described):
        if name in described[:n]:
            raise file.error(("cluster", n, "name"), f"cluster {name!r} is described twice")
    named: list[tuple[Place, str]] = [(("engine", n), table.cluster) for n, table in enumerate(body.engine)]
    named += [(("gpu", n), table.cluster) for n, table in enumerate(body.gpu)]
    for place, name in named:
        if described and name not in described:
            raise file.error(
                (*place, "cluster"),
                f"cluster {name!r} is not described: add [[cluster]] with name = {name!r} and rtt_s",
            )


def _check_allowed(allowed: Sequence[str], body: _File, file: TomlFile, place: Place) -> None:
    """The clusters that a rule names exist: a misspelled one would allow nothing, or nothing that was meant."""
    clusters = {c.name for c in body.cluster} | {e.cluster for e in body.engine} | {g.cluster for g in body.gpu}
    lost = [c for c in allowed if c not in clusters]
    if lost:
        raise file.error(place, f"there is no cluster {lost[0]!r}: this fleet has {', '.join(sorted(clusters))}")


def _check_models(body: _File, file: TomlFile) -> None:
    """No [[gpu]] names a model that its cluster may not have."""
    for n, model in enumerate(body.model):
        _check_allowed(model.allow_clusters, body, file, ("model", n, "allow_clusters"))
        for g, gpu in enumerate(body.gpu):
            if model.name in gpu.models and not model.may_run(gpu.cluster):
                raise file.error(
                    ("gpu", g, "models"),
                    f"model {model.name!r} may not run in cluster {gpu.cluster!r}: its allow_clusters has "
                    f"{', '.join(model.allow_clusters)}. Leave it out here, or allow the cluster",
                )


def _tenants(body: _File, file: TomlFile) -> tuple[Tenant, ...]:
    """Each tenant is described once, and its clusters exist."""
    found: dict[str, Tenant] = {}
    for n, table in enumerate(body.tenant):
        if table.name in found:
            raise file.error(("tenant", n, "name"), f"tenant {table.name!r} is described twice")
        _check_allowed(table.allow_clusters, body, file, ("tenant", n, "allow_clusters"))
        limits = table.model_dump(exclude={"max_kv_gb", "allow_clusters"})
        found[table.name] = Tenant(
            **limits, allow_clusters=tuple(table.allow_clusters), max_kv_bytes=round(table.max_kv_gb * 1e9)
        )
    return tuple(found.values())


def _about(tables: Sequence[GpuTable], this_node: str) -> Sequence[GpuTable]:
    """The tables with "*" filled in; without them where nobody asks, or where the file names this node."""
    named = any(t.node == this_node for t in tables)
    if this_node and not named:
        return [t.model_copy(update={"node": this_node}) if t.node == "*" else t for t in tables]
    return [t for t in tables if t.node != "*"]


def _places(tables: Sequence[GpuTable], file: TomlFile) -> tuple[GpuPlace, ...]:
    """Where GPUs are: nodes without a name are numbered in their cluster, GPUs on their node."""
    found: list[GpuPlace] = []
    numbers: dict[str, int] = {}
    counts: dict[str, int] = {}
    clusters: dict[str, str] = {}
    for n, table in enumerate(tables):
        if table.node and table.nodes > 1:
            raise file.error(("gpu", n, "nodes"), f"node {table.node!r} is one node: leave nodes or node out")
        for _ in range(table.nodes):
            node_id = table.node
            if not node_id:
                node_id = f"{table.cluster}.{numbers.setdefault(table.cluster, 0)}"
                numbers[table.cluster] += 1
            if clusters.setdefault(node_id, table.cluster) != table.cluster:
                raise file.error(
                    ("gpu", n, "cluster"),
                    f"node {node_id!r} is in cluster {clusters[node_id]!r} already: a node is in one cluster",
                )
            first = counts.get(node_id, 0)
            counts[node_id] = first + table.count
            gpus = tuple(f"{node_id}.{g}" for g in range(first, first + table.count))
            found.append(GpuPlace(table=n, node_id=node_id, gpus=gpus))
    return tuple(found)


# -- from the file to the nouns ----------------------------------------------------------------------------------------
def _spec(engine: _Engine, file: TomlFile, place: Place) -> EngineSpec:
    launch = engine.launch
    if engine.kv_window_bytes_per_token > engine.kv_bytes_per_token:
        raise file.error(
            (*place, "kv_window_bytes_per_token"),
            "kv_window_bytes_per_token is a part of kv_bytes_per_token, which is less: say both",
        )
    url = engine.url
    if launch and launch.port and not url:
        url = f"http://127.0.0.1:{launch.port}/v1"
    spec = EngineSpec(
        engine_id=engine.id,
        url=url,
        model=engine.model,
        served_model=engine.served_model,
        slots=engine.slots,
        gpus=engine.gpus or _number(launch, "--tensor-parallel-size", _number(launch, "-tp", 1)),
        kv_bytes=engine.kv_bytes,
        kv_bytes_per_token=engine.kv_bytes_per_token or 1,
        kv_block_tokens=engine.kv_block_tokens or _number(launch, "--block-size", BLOCK_TOKENS),
        kv_window_tokens=engine.kv_window_tokens,
        kv_window_bytes_per_token=engine.kv_window_bytes_per_token,
        api_key_env=engine.api_key_env,
        cluster=engine.cluster,
        hints=engine.hints,
        max_model_len=engine.max_model_len,
    )
    shape: KvShape | None = None
    if launch and not engine.kv_bytes_per_token:
        shape = _kv_shape(launch, spec.kv_block_tokens, file, (*place, "launch", "model_path"))
        spec = shape.on(spec) if shape else spec
        if _said(launch, "--disable-hybrid-kv-cache-manager") is not None:  # vLLM keeps every token in every layer then
            spec = dataclasses.replace(spec, kv_window_tokens=0, kv_window_bytes_per_token=0)
    if engine.kv_bytes:
        return spec
    if engine.kv_tokens:
        return spec.with_kv_tokens(engine.kv_tokens)
    if launch and (shape or engine.kv_bytes_per_token):  # without bytes per token its size would say nothing
        return dataclasses.replace(spec, kv_bytes=launch.kv_cache_memory_bytes)
    return spec


def _launch(table: _LaunchTable, file: TomlFile) -> Launch:
    return Launch(
        kind=table.kind,
        port=table.port,
        model_path=str(_local(table.model_path, file) or table.model_path),
        args=tuple(table.args),
        profile=str(_beside(table.profile, file)) if table.profile.endswith(".toml") else table.profile,
        kv_cache_memory_bytes=table.kv_cache_memory_bytes,
        cpu_core=table.cpu_core,
    )


def _beside(path: str, file: TomlFile) -> Path:
    """A path of the fleet file is meant from the file's own folder."""
    return (file.path.parent / Path(path).expanduser()).resolve()


def _local(model_path: str, file: TomlFile) -> Path | None:
    """A path of the fleet file is meant from the file's own folder; what is no folder there is a Hugging Face name."""
    if not model_path:
        return None
    path = file.path.parent / Path(model_path).expanduser()
    return path.resolve() if path.is_dir() else None


def _kv_shape(launch: _LaunchTable, block_tokens: int, file: TomlFile, place: Place) -> KvShape | None:
    """What the launched model's own configuration says of its KV memory; None where it is not in a folder here."""
    local = _local(launch.model_path, file)
    if local is None or not (local / "config.json").is_file():
        return None
    try:
        config = json.loads((local / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ConfigError("config.json: not an object")
        return KvShape.from_config(
            cast("dict[str, Any]", config),
            tensor_parallel=_number(launch, "--tensor-parallel-size", _number(launch, "-tp", 1)),
            dtype=_said(launch, "--dtype") or "auto",
            kv_cache_dtype=_said(launch, "--kv-cache-dtype") or "auto",
            block_tokens=block_tokens,
        )
    except (OSError, ValueError, ConfigError) as e:
        raise file.error(place, f"{local}: {e}") from e


def _said(launch: _LaunchTable | None, flag: str) -> str | None:
    """What the server's command line says of a flag: ``--flag value`` or ``--flag=value``; None where it does not."""
    words = launch.args if launch else []
    for n, word in enumerate(words):
        name, _, value = word.partition("=")
        if (name.replace("_", "-") if name.startswith("--") else name) == flag:
            return value or (words[n + 1] if n + 1 < len(words) else "")
    return None


def _number(launch: _LaunchTable | None, flag: str, default: int) -> int:
    said = _said(launch, flag) or ""
    return int(said) if said.isdecimal() and int(said) > 0 else default
