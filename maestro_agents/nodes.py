"""What a node says of its GPUs and engines, and what it is asked for.

A node agent reports what is true (`NodeReport`) by heartbeat and carries out what is wanted of it (`Wanted`). Wishes are a
state, not commands: said twice they change nothing, and an agent that was away reads what is wanted now. The agent decides
nothing itself; who decides is the scheduler's placement (`maestro_agents.policy.placement`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar, cast

from maestro_agents.core import EngineSpec
from maestro_agents.errors import WireError

Tier = Literal["gpu", "sleeping", "dropped", "host", "disk", "remote"]
"""Where a model's weights are, seen from one GPU (arXiv 2606.12950: "five weight states"):

- ``gpu``: a server runs, weights and KV in HBM; it alone serves.
- ``sleeping``: the server lives, weights in host memory (vLLM's sleep level 1); as many as host memory holds.
- ``dropped``: the server lives without weights (level 2); they are read again from the node's disk.
- ``host``: no server, its weights in the page cache.
- ``disk``: no server, weights on the node's disk.
- ``remote``: the weights are not on the node.
"""

MOVES: Final[Mapping[Tier, frozenset[Tier]]] = {
    "remote": frozenset({"disk"}),
    "disk": frozenset({"host", "gpu"}),
    "host": frozenset({"gpu", "disk"}),
    "gpu": frozenset({"sleeping", "dropped", "host", "disk"}),
    "sleeping": frozenset({"gpu", "host", "disk"}),
    "dropped": frozenset({"gpu", "host", "disk"}),
}
"""The moves that there are. vLLM cannot go from one sleep level to the other; a longer way is made of several moves."""

Elastic = Literal["enforced", "accounted"]
"""``enforced``: the engine holds its KV budget (kvcached, the emulator). ``accounted``: admission does; no HBM is freed by it."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A move that ended. ``error``: why it failed; the model is then where it was."""

    engine_id: str
    was: Tier
    to: Tier
    began_at_s: float
    took_s: float
    moved_bytes: int = 0
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReport:
    """One engine: a model on a GPU, whether its server runs or not. Moments are the pool's clock's."""

    spec: EngineSpec
    gpu_id: str
    tier: Tier
    #: Where it is going; ``tier`` while it rests.
    to: Tier
    #: HBM of weights and server while awake; host memory while sleeping.
    hbm_bytes: int = 0
    weight_bytes: int = 0
    #: KV memory that it has at least (one request of the longest length; all, where it can give none back); its part of what there is (``spec.kv_bytes`` may be promised there, more
    #: where the node over-subscribes); what its own metrics say is in use, -1 while unknown.
    kv_floor_bytes: int = 0
    kv_bytes: int = 0
    kv_used_bytes: int = -1
    elastic: Elastic = "accounted"
    #: When it came to its tier.
    changed_at_s: float = 0.0
    #: Seconds of a move to the GPU from each tier, and from the GPU to each: measured, else estimated from bytes.
    wake_s: Mapping[str, float] = field(default_factory=dict[str, float])
    leave_s: Mapping[str, float] = field(default_factory=dict[str, float])
    #: Requests by its own metrics; -1 while unknown.
    running: int = -1
    waiting: int = -1
    #: Its own metrics besides, -1 while unknown: share of prompt tokens found in the prefix cache lately, requests preempted
    #: since its server began, tokens that it makes in a second with what runs now.
    prefix_hit_rate: float = -1.0
    preemptions: int = -1
    tokens_per_s: float = -1.0
    #: Its last move failed, and why.
    failed_at_s: float = 0.0
    failed: str = ""
    restarts: int = 0
    #: Restarts on request so far (`Want.rejuvenation`), and why one is advised: the trend of its memory, in words.
    rejuvenation: int = 0
    ageing: str = ""
    #: When its memory is full at the earliest, at that trend; 0 while it has none.
    exhausted_at_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReport:
    """One GPU: its memory, what engines may have of it, and how hard pressed it is (`maestro_serving.elastic_kv`)."""

    gpu_id: str
    memory_bytes: int
    usable_bytes: int
    level: str = "normal"
    #: Weights, servers, and all KV memory that engines there hold or may hold: never more than ``usable_bytes``.
    held_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """A node's account of itself."""

    node_id: str
    cluster: str = "local"
    at_s: float = 0.0
    #: Host memory for sleeping models, and what of it is free.
    ram_bytes: int = 0
    ram_free_bytes: int = 0
    gpus: Sequence[GpuReport] = ()
    engines: Sequence[EngineReport] = ()
    #: The last moves, oldest first.
    moves: Sequence[Move] = ()

    def encode(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def decode(cls, body: str) -> NodeReport:
        """Raises `WireError`. Fields that this version does not know are left out."""
        try:
            said = json.loads(body)
            said["gpus"] = [_known(GpuReport, g) for g in said["gpus"]]
            said["moves"] = [_known(Move, m) for m in said["moves"]]
            for e in said["engines"]:
                e["spec"] = EngineSpec.decode(e["spec"])
            said["engines"] = [_known(EngineReport, e) for e in said["engines"]]
            return _known(cls, said)
        except (ValueError, TypeError, KeyError) as e:
            raise WireError(f"not a node's report: {e}") from e


@dataclass(frozen=True, kw_only=True, slots=True)
class Want:
    """What is wanted of an engine: a tier, KV memory (0: as it is), and how often it shall have been restarted."""

    tier: Tier
    kv_bytes: int = 0
    rejuvenation: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What is wanted of a node, whole. An engine that is not named stays as it is. An older epoch's word changes nothing."""

    epoch: int
    engines: Mapping[str, Want] = field(default_factory=dict[str, Want])

    def encode(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def decode(cls, body: str) -> Wanted:
        """Raises `WireError`. Fields that this version does not know are left out."""
        try:
            said = json.loads(body)
            engines = {str(engine_id): _known(Want, want) for engine_id, want in said["engines"].items()}
            return cls(epoch=int(said["epoch"]), engines=engines)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise WireError(f"not what is wanted of a node: {e}") from e


def _known(cls: type[T], body: Mapping[str, Any]) -> T:
    names = {f.name for f in dataclasses.fields(cast("Any", cls))}
    return cls(**{k: v for k, v in body.items() if k in names})
