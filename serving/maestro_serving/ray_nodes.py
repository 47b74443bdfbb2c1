"""The nodes of a fleet on the machines of a Ray cluster (`maestro up --ray`): Ray says where each runs, and where it comes back.

Each node of the fleet file is one placement group with one bundle (`bundles`), and in it one actor (`NodeKeeper`) that starts and
watches the real node agent (``maestro node``) there, as a child process. Everything else is as without Ray: Redis holds the state,
the scheduler decides, agents report. When a machine dies, Ray places the group and restarts the actor where resources allow
(Ray docs, "Actor fault tolerance", "Placement groups"); until then the node waits, and nobody else does.

The driver owns groups and actors: when it ends, kill -9 included, Ray ends them. The only module that imports Ray.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from maestro_agents import __version__, guard
from maestro_agents.errors import ConfigError, EngineUnavailable
from maestro_agents.fleet import FleetTables
from maestro_agents.redis_url import RedisUrl
from maestro_agents.tokens import HOW
from maestro_serving.node import DRAIN_S
from maestro_serving.processes import GRACE_S, free_port
from maestro_serving.proxy import on_loopback

HOW_TO_GET: Final = "pip install 'maestro-agents[ray]'"
LOCAL: Final = "local"
AUTO: Final = "auto"
HOW_TO_START: Final = (
    f"Start a cluster with `ray start --head`, join this machine with `ray start --address ...`, or try --ray {LOCAL}"
)

CONNECT_S: Final = 5.0
"""Who has not taken a connection by then is not there."""
"""As an address: a Ray of one machine, started here and ended with us, with as many resources as the fleet asks for."""

STORE_BYTES: Final = 80_000_000
"""Object store of a Ray that is started here: nothing goes through it."""

GONE_GRACE_S: Final = 5.0
"""How long an agent may take to end when its actor or its raylet is gone: shorter than Ray takes to have the node elsewhere, so that
two never report for it. Engines that are busy then end by their lease (`processes.LEASE_S`).
"""

LOOK_S: Final = 0.25
LOOK_LIMIT_S: Final = 2.0
FIRST_BACKOFF_S: Final = 0.5
LAST_BACKOFF_S: Final = 30.0
STABLE_S: Final = 60.0
"""After so long a life an agent's death counts as the first again."""

_ACCELERATOR: Final = "accelerator_type:"
_SOME: Final = 0.001
"""What Ray itself asks of ``accelerator_type:X``, of which a machine has 1."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What an actor is told: all that its agent needs. Secrets travel through Ray, which is inside the pool's trust domain."""

    node_id: str
    pool: str
    redis_url: str = field(repr=False)
    fleet_name: str
    fleet_text: str = field(repr=False)
    #: Of the proxies in front of engines; "": engines are on loopback.
    engine_key: str = field(repr=False)
    #: Of the machine where `maestro up` runs; the only one that engines on loopback are of use to.
    head_ip: str
    version: str = __version__


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where a node is. ``ray_node``: Ray's id of the machine, "" while it waits for one."""

    wants: Mapping[str, float]
    ray_node: str = ""
    ip: str = ""
    #: The agent's process, 0 while it is not known to run.
    pid: int = 0
    #: Its state folder on that machine, and the end of its log where it ended.
    folder: str = ""
    ended: str = ""

    def words(self) -> str:
        """For people."""
        if not self.ray_node:
            return f"waits for a machine with {_amounts(self.wants)}"
        return f"on {self.ip} (Ray node {self.ray_node[:6]})" + (
            f", its agent ended: {self.ended}" if self.ended else ""
        )


def bundles(tables: FleetTables) -> Mapping[str, Mapping[str, float]]:
    """What each node asks Ray for: one CPU for each of its GPUs, the GPUs themselves where a model is served by a real server
    and the kind is not "cpu", and what the file names (``ray_resource``). Raises `ConfigError`.
    """
    if not tables.places:
        raise ConfigError(f"{tables.file.path} has no [[gpu]]: Ray places nodes, and a node is made of its GPUs")
    for n, model in enumerate(tables.models):
        path = model.launch.model_path if model.launch else ""
        if path and not Path(path).is_absolute() and (tables.file.path.parent / path).is_dir():
            raise tables.file.error(
                ("model", n, "launch", "model_path"),
                f"model_path = {path!r} is meant from this file's folder, which other machines do not have: give the whole path, "
                "the same on every machine",
            )
    real = any(m.launch is not None and m.launch.kind == "vllm" for m in tables.models)
    found: dict[str, dict[str, float]] = {}
    for place in tables.places:
        table, count = tables.gpus[place.table], float(len(place.gpus))
        asked = {"CPU": count}
        if real and table.kind != "cpu":
            asked["GPU"] = count
        if name := table.ray_resource:
            asked[name] = _SOME if name.startswith(_ACCELERATOR) else count
        bundle = found.setdefault(place.node_id, {})
        for name, amount in asked.items():
            bundle[name] = _SOME if amount == _SOME else bundle.get(name, 0.0) + amount
    return found


def _amounts(wants: Mapping[str, float]) -> str:
    return ", ".join(name if n == _SOME else f"{n:g} {name}" for name, n in sorted(wants.items(), key=lambda x: -x[1]))


def check_reachable(hosts: Sequence[str], *, redis_url: str, engine_key: str) -> None:
    """Raise `ConfigError` where machines of a cluster could not reach Redis, or clients its engines."""
    if len(set(hosts)) < 2:
        return
    redis = RedisUrl.parse(redis_url)
    near = [host for host, _ in redis.hosts if on_loopback(f"//{host}")] or [redis.path] * (redis.kind == "unix")
    if near:
        raise ConfigError(
            f"this Ray cluster has {len(set(hosts))} hosts, and they cannot reach a Redis at {near[0]}: name one that they can "
            "reach, by --redis-url or [redis] url"
        )
    if not engine_key:
        raise ConfigError(
            f"this Ray cluster has {len(set(hosts))} hosts: engines are reached through a proxy on each, which needs a key. Name its "
            f"file by MAESTRO_ENGINE_KEY_FILE (`{HOW}`)"
        )


def check_address(address: str) -> None:
    """Raise `ConfigError` where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    if address in {LOCAL, AUTO}:
        return
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S):
            pass
    except (OSError, ValueError, OverflowError) as e:
        why = getattr(e, "strerror", None) or "it looks like HOST:PORT"
        raise ConfigError(f"--ray {address}: {why}. {HOW_TO_START}") from None


def _ray(*, loopback: bool = False) -> Any:
    """Ray, imported. ``loopback``: before the first import, else it says nothing: a Ray started here stays on 127.0.0.1."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if loopback:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = (
            "0"  # by its name; what it does is to take 127.0.0.1 for this machine
        )
    try:
        import ray
        import ray.util.scheduling_strategies as _strategies
    except ImportError:
        raise ConfigError(f"--ray needs Ray: {HOW_TO_GET} (for which Pythons it has wheels: docs.ray.io)") from None
    del _strategies  # imported for `ray.util.scheduling_strategies`
    return ray


@contextlib.contextmanager
def _our_path() -> Iterator[None]:
    """What is started inside finds what we found, in an editable checkout as in an installed wheel."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


class RayNodes:
    """The nodes of a fleet file on a Ray cluster. Methods block, and may be called from any thread."""

    def __init__(self, tables: FleetTables, *, address: str, redis_url: str, pool: str, engine_key: str = "") -> None:
        self.wants = bundles(tables)
        self._tables = tables
        self._address = address
        self._redis_url = redis_url
        self._pool = pool
        self._engine_key = engine_key
        self._ray: Any = None
        self._ours = False
        self._groups: dict[str, Any] = {}
        self._actors: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}
        self._said: dict[str, Mapping[str, Any]] = {}
        self._looking = threading.Lock()
        self._machines: set[str] | None = None
        self._told: dict[str, str] = {}

    def start(self) -> None:
        """Ask Ray for a place for each node. Nothing is waited for: see `look`. Raises `ConfigError`."""
        ray = self._ray = _ray(loopback=self._address == LOCAL)
        self._connect()
        hosts = [n["NodeManagerAddress"] for n in self._alive().values()]
        check_reachable(hosts, redis_url=self._redis_url, engine_key=self._engine_key)
        for node_id, wants in self.wants.items():
            group = ray.util.placement_group(
                [dict(wants)], strategy="STRICT_PACK", name=f"maestro {self._pool} {node_id}"
            )
            self._groups[node_id] = group
            order = Order(
                node_id=node_id,
                pool=self._pool,
                redis_url=self._redis_url,
                fleet_name=self._tables.file.path.name,
                fleet_text=self._tables.file.path.read_text(encoding="utf-8"),
                engine_key=self._engine_key,
                head_ip=ray.util.get_node_ip_address(),
            )
            rest = {name: n for name, n in wants.items() if name not in {"CPU", "GPU"}}
            self._actors[node_id] = (
                ray.remote(NodeKeeper)
                .options(
                    num_cpus=wants["CPU"],
                    num_gpus=wants.get("GPU", 0.0),
                    resources=rest,
                    max_restarts=-1,
                    max_concurrency=2,
                    scheduling_strategy=ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, 0),
                )
                .remote(order)
            )

    def _connect(self) -> None:
        ray = self._ray
        if ray.is_initialized():
            return
        said: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if self._address == LOCAL:
            total: dict[str, float] = {}
            for wants in self.wants.values():
                for name, n in wants.items():
                    total[name] = total.get(name, 0.0) + n
            said |= {"num_cpus": total.pop("CPU"), "num_gpus": total.pop("GPU", 0.0), "resources": total}
            said |= {"include_dashboard": False, "object_store_memory": STORE_BYTES, "_node_ip_address": "127.0.0.1"}
        main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with _our_path():
                ray.init(address=self._address, **said)
        except (ConnectionError, ValueError, RuntimeError, AssertionError) as e:
            first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise ConfigError(f"--ray {self._address}: {first}. {HOW_TO_START}") from None
        finally:
            if main:
                signal.signal(signal.SIGTERM, handler)  # Ray puts its own in its place
        self._ours = True

    def _alive(self) -> Mapping[str, Mapping[str, Any]]:
        """The machines that Ray takes for alive, by its id."""
        return {n["NodeID"]: n for n in self._ray.nodes() if n["Alive"]}

    def look(self) -> Mapping[str, Placed]:
        """Where each node is now, as far as Ray and its actor have said."""
        with self._looking:
            return self._look()

    def _look(self) -> Mapping[str, Placed]:
        ray = self._ray
        alive = self._alive()
        found: dict[str, Placed] = {}
        for node_id, wants in self.wants.items():
            table = ray.util.placement_group_table(self._groups[node_id])
            at = str(table["bundles_to_node_id"].get(0, "")) if table["state"] == "CREATED" else ""
            if at not in alive:
                found[node_id] = Placed(wants=wants)
                continue
            said = self._hear(node_id)
            here = said if said.get("ray_node") == at else dict[str, Any]()
            found[node_id] = Placed(
                wants=wants,
                ray_node=at,
                ip=alive[at]["NodeManagerAddress"],
                pid=here.get("pid", 0),
                folder=here.get("folder", ""),
                ended=here.get("ended", ""),
            )
        return found

    def _hear(self, node_id: str) -> Mapping[str, Any]:
        """What an actor said last; it is asked again. One that Ray moves just now says nothing. Raises `EngineUnavailable`."""
        ray = self._ray
        if node_id not in self._asked:
            self._asked[node_id] = self._actors[node_id].look.remote()
        ready, _ = ray.wait([self._asked[node_id]], timeout=0)
        if ready:
            del self._asked[node_id]
            try:
                self._said[node_id] = ray.get(ready[0])
            except ray.exceptions.RayTaskError as e:
                raise EngineUnavailable(f"node {node_id}: {e.cause}") from None
            except ray.exceptions.RayActorError as e:
                self._said.pop(node_id, None)
                if "creation task" in str(e) or "__init__" in str(e):  # else Ray restarts it
                    raise EngineUnavailable(f"node {node_id} cannot start: {str(e).strip().splitlines()[-1]}") from None
        return self._said.get(node_id, {})

    def news(self) -> Sequence[str]:
        """What has changed since the last time: machines that joined or died, nodes that came, went or wait."""
        lines: list[str] = []
        if self._ray is None:
            return lines
        machines = {f"{n['NodeManagerAddress']} (Ray node {ray_node[:6]})" for ray_node, n in self._alive().items()}
        if self._machines is not None:
            lines += [f"machine {m} joined the Ray cluster" for m in sorted(machines - self._machines)]
            lines += [f"machine {m} is gone" for m in sorted(self._machines - machines)]
        self._machines = machines
        for node_id, placed in self.look().items():
            words = placed.words()
            if self._told.setdefault(node_id, words) != words:
                self._told[node_id] = words
                lines.append(f"node {node_id} {words}")
        return lines

    def resources(self) -> Mapping[str, Mapping[str, float]]:
        """What Ray counts in all, and what of it is free."""
        ray = self._ray
        return {
            "total": {k: v for k, v in ray.cluster_resources().items() if k in self._kinds},
            "free": {k: v for k, v in ray.available_resources().items() if k in self._kinds},
        }

    @property
    def _kinds(self) -> set[str]:
        return {name for wants in self.wants.values() for name in wants}

    def stop(self) -> None:
        """End all agents in order (their engines finish what runs), then give all places back. Idempotent."""
        ray, self._ray = self._ray, None
        if ray is None:
            return
        actors, self._actors = self._actors, {}
        groups, self._groups = self._groups, {}
        with contextlib.suppress(Exception):  # the cluster may be gone: what ran there ends by itself
            placed = [n for n, g in groups.items() if ray.util.placement_group_table(g)["state"] == "CREATED"]
            ends = [actors[n].stop.remote() for n in placed if n in actors]
            if ends:
                ray.wait(ends, num_returns=len(ends), timeout=DRAIN_S + 2 * GRACE_S)
            for group in groups.values():
                ray.util.remove_placement_group(group)
        if self._ours:
            ray.shutdown()


# -- on a machine of the cluster -----------------------------------------------------------------------------------------
class NodeKeeper:
    """The actor of one node: starts its agent, and starts it again when it ends, later each time.

    Killed, or without its raylet, it takes its agent with it (`GONE_GRACE_S`). On the same machine the next one has the same state
    folder, so that its agent takes over what still runs.
    """

    def __init__(self, order: Order) -> None:
        if order.version != __version__:
            raise ConfigError(
                f"this machine has maestro-agents {__version__}, `maestro up` is {order.version}: install the same on all"
            )
        ray = _ray()
        self._order = order
        self._ray_node = str(ray.get_runtime_context().get_node_id())
        self._ip = str(ray.util.get_node_ip_address())
        self._folder = Path(tempfile.gettempdir(), f"maestro-ray-{os.getuid()}", order.pool, self._ray_node[:12])
        self._raylet = os.getppid()
        self._agent: guard.Guarded | None = None
        self._ended = ""
        self._end = threading.Event()
        self._work = threading.Thread(target=self._keep, name="maestro-node", daemon=True)
        self._work.start()

    def look(self) -> Mapping[str, Any]:
        """How it is."""
        agent = self._agent
        return {
            "ray_node": self._ray_node,
            "ip": self._ip,
            "pid": agent.pid if agent is not None and agent.alive() else 0,
            "folder": str(self._folder),
            "ended": self._ended,
        }

    def stop(self) -> None:
        """End the agent in order, and stay ended."""
        self._end.set()
        self._work.join(DRAIN_S + 2 * GRACE_S)

    def _keep(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._end.is_set():
            began_s = time.monotonic()
            try:
                self._live()
            except (OSError, ConfigError) as e:
                self._ended = str(e)
            if time.monotonic() - began_s > STABLE_S:
                backoff_s = FIRST_BACKOFF_S
            self._end.wait(backoff_s)
            backoff_s = min(LAST_BACKOFF_S, 2 * backoff_s)

    def _live(self) -> None:
        """One life of the agent."""
        command = self._command()
        log = self._folder / f"{self._order.node_id}.log"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        if self._order.engine_key:
            env["MAESTRO_ENGINE_KEY_FILE"] = str(self._folder / "engine.key")
        agent = self._agent = guard.spawn(command, log=log, env=env, grace_s=GONE_GRACE_S)
        while agent.alive() and not self._end.wait(LOOK_S):
            if (
                os.getppid() != self._raylet
            ):  # Ray's own workers notice many seconds later, when the node is back elsewhere
                agent.stop()
                os._exit(1)
        if agent.alive():
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                os.kill(agent.pid, signal.SIGTERM)
                agent.wait(DRAIN_S + GRACE_S)
        agent.stop()
        with contextlib.suppress(OSError, IndexError):
            self._ended = log.read_text(errors="replace").splitlines()[-1]

    def _command(self) -> list[str]:
        """Write what the agent reads; its command line. Raises `ConfigError`, OSError."""
        order = self._order
        hosts = [order.head_ip, self._ip]
        check_reachable(hosts, redis_url=order.redis_url, engine_key=order.engine_key)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fleet = self._folder / order.fleet_name
        fleet.write_text(order.fleet_text, encoding="utf-8")
        command = [sys.executable, "-m", "maestro_agents.cli", "node", "--fleet", str(fleet), "--node", order.node_id]
        command += ["--redis-url", order.redis_url, "--pool", order.pool, "--state", str(self._folder / "nodes")]
        if order.engine_key:
            key = self._folder / "engine.key"
            key.touch(mode=0o600)
            key.write_text(order.engine_key, encoding="utf-8")
            command += ["--listen", f"{self._ip}:{free_port()}"]
        return command


# -- for tests and the bench ---------------------------------------------------------------------------------------------
class LoopbackCluster:
    """A Ray cluster of several "machines" on this one, all on 127.0.0.1: a raylet each (`ray.cluster_utils`, which Ray tests by).

    The first is the head, where this process is. ``resources``: of each machine, ``CPU`` and ``GPU`` among them; they are only
    counted.
    """

    def __init__(
        self, machines: int, resources: Mapping[str, float], *, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._ray = _ray(loopback=True)
        from ray.cluster_utils import Cluster

        self._folder = tempfile.mkdtemp(prefix="maestro-ray-")  # sockets are in it, whose paths may not be long
        rest = dict(resources)
        self._said: dict[str, Any] = {"num_cpus": rest.pop("CPU", 1.0), "num_gpus": rest.pop("GPU", 0.0)}
        self._said |= {"resources": rest, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self._said |= {"node_ip_address": "127.0.0.1"}
        with _our_path():
            self._cluster: Any = Cluster(initialize_head=True, head_node_args={**self._said, "temp_dir": self._folder})
        self._raylets: dict[str, Any] = {self._cluster.head_node.node_id: self._cluster.head_node}
        self.address = str(self._cluster.address)
        say("machine 1 runs")
        self._ray.init(address=self.address, log_to_driver=False, configure_logging=False)
        for n in range(1, machines):
            self.add()
            say(f"machine {n + 1} runs")

    @property
    def head(self) -> str:
        """Ray's id of the machine where the head is."""
        return str(self._cluster.head_node.node_id)

    def add(self) -> str:
        """One machine more; Ray's id of it. In the main thread."""
        with _our_path():
            node = self._cluster.add_node(**self._said)
        self._raylets[node.node_id] = node
        return str(node.node_id)

    def raylet_pid(self, ray_node: str) -> int:
        """The process that is a machine, to Ray."""
        return int(self._raylets[ray_node].all_processes["raylet"][0].process.pid)

    def stop(self) -> None:
        """End all of it."""
        self._ray.shutdown()
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
