"""What a node agent works with: its GPUs, the engines that may run on them, and a driver for each engine.

A driver knows how one kind of server is started, put to sleep, looked at: `vllm_driver`, `emulated_driver`. The agent (`node`) knows
when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from maestro_agents.core import EngineSpec
from maestro_agents.fleet import Launch
from maestro_agents.nodes import Elastic
from maestro_agents.simulator.hardware import Served


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeGpu:
    """One GPU of a node. On ``kind = "cpu"`` its memory is accounted, not physical."""

    gpu_id: str
    #: As CUDA counts it on its node.
    index: int
    kind: str
    memory_bytes: int
    #: What weights, servers and KV may have of it.
    usable_bytes: int
    #: ``kind = "cpu"``: the core that its engines run on.
    cpu_core: int | None = None
    #: Folder for what outlives the agent: which process runs here, and logs.
    state: Path = Path()
    #: How many times the KV memory that elastic engines share their budgets may come to (`elastic_kv.MAX_FACTOR`).
    kv_factor: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeEngine:
    """A model on a GPU of the node, whether its server runs or not. Sizes are those on each of its GPUs."""

    #: ``url`` is "" until a server was started.
    spec: EngineSpec
    #: Where it runs: one GPU, or as many as it is tensor-parallel.
    gpus: tuple[str, ...]
    launch: Launch
    weight_bytes: int
    #: What its server takes of the GPU besides weights and KV, while it is awake.
    server_bytes: int
    #: KV memory that it has at least: one request of the longest length; all of it where the server cannot give any back.
    kv_floor_bytes: int
    #: What the emulator, and estimates of moves that were never made, rest on; None for a model without a profile.
    served: Served | None = None
    #: Its weights, where they are files here.
    weight_files: tuple[Path, ...] = ()
    #: Placement may put it to sleep.
    sleeps: bool = True

    @property
    def engine_id(self) -> str:
        return self.spec.engine_id

    @property
    def hbm_bytes(self) -> int:
        """HBM while awake, KV aside."""
        return self.weight_bytes + self.server_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What an engine is seen to be. -1 where it does not say."""

    #: Its process runs, or its adopted server answers.
    alive: bool
    #: ``/health`` is 200. It is so while asleep, too.
    healthy: bool = False
    #: vLLM's sleep level; None while awake.
    asleep: int | None = None
    running: int = -1
    waiting: int = -1
    kv_used_bytes: int = -1
    #: Of the whole process tree: proportional set size, and memory on its GPUs.
    host_bytes: int = -1
    device_bytes: int = -1
    #: Share of prompt tokens found in the prefix cache since the last look; since the server began, tokens made and requests
    #: preempted.
    prefix_hit_rate: float = -1.0
    generated_tokens: int = -1
    preemptions: int = -1


class Driver(Protocol):
    """How one engine is moved and looked at. One call that changes something at a time; `look` may run beside it."""

    elastic: Elastic

    async def start(self) -> str:
        """Have a new server up, weights in HBM, and return its URL (it ends in ``/v1``) once it serves.

        Raises `EngineUnavailable`; nothing is left then.
        """
        ...

    async def adopt(self) -> str | None:
        """Take over the server that outlived an agent, as it is, and return its URL. None: there is none."""
        ...

    async def stop(self) -> None:
        """End the server with all that it started. Idempotent."""
        ...

    async def sleep(self, level: int) -> None:
        """Put it to sleep: 1 keeps weights in host memory, 2 drops them. It is idle. Raises `EngineUnavailable`."""
        ...

    async def wake(self) -> None:
        """Wake it from either level and return when it serves: it has answered a request. Raises `EngineUnavailable`."""
        ...

    async def limit_kv(self, kv_bytes: int) -> None:
        """Let it have so much KV memory (``elastic == "enforced"``); what is in use beyond that it gives back as it can.

        Said before `start` or `wake`: it has so much from then on.
        """
        ...

    async def look(self) -> Look:
        """Never raises, and answers within seconds."""
        ...

    async def close(self) -> None:
        """Let go of connections. Servers run on."""
        ...


DriverOf = Callable[[NodeEngine, NodeGpu], Driver]
"""Makes the driver of an engine on (the first of) its GPUs."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A node as its fleet file describes it (`maestro_serving.hosts`)."""

    node_id: str
    cluster: str
    #: For the weights of sleeping models.
    ram_bytes: int
    gpus: tuple[NodeGpu, ...]
    engines: tuple[NodeEngine, ...]
    #: Engines that are on a GPU where nobody has said anything yet.
    at_start: tuple[str, ...] = ()
