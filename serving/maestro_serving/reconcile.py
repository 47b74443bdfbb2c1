"""From what a node's engines are to what is wanted of them: the next steps, as a function.

`plan` decides nothing about who should be where; it finds the way there and keeps three laws at every instant:

- A GPU's memory holds what is in it, what is coming (from the first second of a start or wake) and what is leaving (until its
  sleep or end is over). A wish that does not fit waits.
- Host memory holds the weights of all that sleep or are on their way there. A wish that does not fit waits.
- Nothing that serves is moved: an engine that shall leave its GPU is announced first (``to``), so that it gets nothing new, and
  moves when its own metrics have twice said that nothing runs or waits there.

One move at a time per engine. A wish may change at any moment: one that was only announced is taken back, a move that has
begun is finished first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from maestro_agents.nodes import Tier, Want
from maestro_serving.elastic_kv import KvLedger
from maestro_serving.weights import HAS_SERVER, way


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """An engine as it is now."""

    engine_id: str
    gpus: tuple[str, ...]
    tier: Tier
    #: Where it is going, or is announced to go.
    to: Tier
    #: A move is under way: it is waited for.
    moving: bool = False
    #: Its own metrics agree that nothing runs or waits there.
    idle: bool = False
    #: Weights and server; KV memory at least; what KV memory it has wherever it is awake (``enforced``: 0).
    fixed_bytes: int = 0
    floor_bytes: int = 0
    kv_bytes: int = 0
    enforced: bool = False
    #: Host memory while it sleeps.
    weight_bytes: int = 0
    #: Its last move failed: none is begun before.
    ready_at_s: float = 0.0
    #: It is to be restarted before anything else.
    restart: bool = False
    #: Tiers that it can be in.
    can: frozenset[Tier] = frozenset({"gpu", "sleeping", "dropped", "disk"})
    #: Seconds of its moves, to choose among ways.
    seconds: Mapping[tuple[Tier, Tier], float] = field(default_factory=dict[tuple[Tier, Tier], float])


@dataclass(frozen=True, slots=True)
class Announce:
    """Let it be known where an engine is going; nothing moves yet."""

    engine_id: str
    to: Tier


@dataclass(frozen=True, slots=True)
class Go:
    """Begin a move. Where it leads to a GPU, its room there is taken already."""

    engine_id: str
    to: Tier


Step = Announce | Go


def plan(
    engines: Sequence[Standing],
    wants: Mapping[str, Want],
    ledgers: Mapping[str, KvLedger],
    *,
    ram_bytes: int,
    now_s: float,
) -> list[Step]:
    """The next steps. Nothing is touched but the ledgers (by GPU), in which room is taken for what goes to a GPU.

    Among engines that want to a GPU, those first that ``wants`` names first; where one does not fit yet but will, nothing takes
    its room.
    """
    steps: list[Step] = []
    ram_left = ram_bytes - sum(e.weight_bytes for e in engines if "sleeping" in {e.tier, e.to})
    cache_left = ram_left - sum(e.weight_bytes for e in engines if "host" in {e.tier, e.to})
    goals: dict[str, Tier] = {}
    for e in engines:
        if not e.moving:
            goals[e.engine_id] = _next(e, wants.get(e.engine_id))

    def still(e: Standing) -> None:
        if e.to != e.tier:
            steps.append(Announce(e.engine_id, e.tier))

    for e in engines:
        goal = goals.get(e.engine_id)
        if goal is None or goal == "gpu":
            continue
        if goal == e.tier or (now_s < e.ready_at_s and not e.restart):
            still(e)
            continue
        if goal == "sleeping" != e.to:
            if e.weight_bytes > ram_left:
                still(e)
                continue
            ram_left -= e.weight_bytes
            cache_left -= e.weight_bytes
        if goal == "host" and e.tier == "disk":
            if e.weight_bytes > cache_left:
                still(e)
                continue
            cache_left -= e.weight_bytes
        if e.tier == "gpu" and not e.idle:
            if e.to != goal:
                steps.append(Announce(e.engine_id, goal))
        else:
            steps.append(Go(e.engine_id, goal))

    order = {engine_id: n for n, engine_id in enumerate(wants)}
    taken: set[str] = set()
    for e in sorted(engines, key=lambda e: order.get(e.engine_id, len(order))):
        if goals.get(e.engine_id) != "gpu":
            continue
        if e.tier == "gpu" or now_s < e.ready_at_s:
            still(e)
        elif taken.isdisjoint(e.gpus) and _enter(e, wants.get(e.engine_id), ledgers):
            steps.append(Go(e.engine_id, "gpu"))
        else:
            still(e)
            if _will_fit(e, engines, goals, ledgers):
                taken.update(e.gpus)
    return steps


def _next(e: Standing, want: Want | None) -> Tier:
    """The tier of the engine's next move; its own where it is where it shall be, or cannot be where it shall."""
    if e.restart and e.tier in HAS_SERVER:
        return "host" if "host" in e.can else "disk"
    if want is None:
        return e.tier
    path = way(e.tier, want.tier, e.seconds, e.can)
    return path[0] if path else e.tier


def _enter(e: Standing, want: Want | None, ledgers: Mapping[str, KvLedger]) -> bool:
    """Take room on all of its GPUs, or on none."""
    kv_bytes = e.kv_bytes if not e.enforced else want.kv_bytes if want else 0
    for n, gpu in enumerate(e.gpus):
        if not ledgers[gpu].enter(
            e.engine_id,
            fixed_bytes=e.fixed_bytes,
            floor_bytes=e.floor_bytes,
            kv_bytes=kv_bytes,
            elastic="enforced" if e.enforced else "accounted",
        ):
            for had in e.gpus[:n]:
                ledgers[had].leave(e.engine_id)
            return False
    return True


def _will_fit(
    e: Standing, engines: Sequence[Standing], goals: Mapping[str, Tier], ledgers: Mapping[str, KvLedger]
) -> bool:
    """Whether there is room once all that shall leave its GPUs has left: else it holds nobody up."""
    for gpu in e.gpus:
        stay = [o for o in engines if gpu in o.gpus and o is not e and o.tier == "gpu" == goals.get(o.engine_id, o.to)]
        left = ledgers[gpu].usable_bytes - sum(o.fixed_bytes + max(o.floor_bytes, o.kv_bytes) for o in stay)
        if e.fixed_bytes + max(e.floor_bytes, e.kv_bytes) > left:
            return False
    return True
