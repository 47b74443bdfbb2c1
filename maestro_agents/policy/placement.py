"""Which model is awake on which GPU, with how much KV memory: pure functions from a snapshot to actions.

Weights are in one of the tiers of `nodes.Tier` (arXiv 2606.12950: "five weight states, hierarchical LRU"). What has none in HBM
and is put there starts from where it is; what leaves goes to ``sleeping`` or ``dropped``.

A wake takes HBM from its first second and serves from its last; KV memory is taken from, and given to, the models that are
awake beside it. Nothing that serves is put to sleep: it gets no more stages, and sleeps once those it has are done.

What is compared is waiting, in stage-seconds: what stages have waited and would wait without an action, against what the
action makes others wait.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from maestro_agents.nodes import Tier

HORIZON_S: Final = 30.0
"""How far ahead demand counts where nobody sleeps for it, and the waiting of a stage where its model is served."""

DWELL: Final = 5.0
"""A model stays awake for so many times what it takes to sleep and wake again: swaps take a sixth of the time at most."""

MIN_DWELL_S: Final = 10.0

PATIENCE_S: Final = 60.0
"""A stage that waited so long for its model has it woken, whatever that costs others; only the dwell is kept."""

LATE_COUNTS: Final = 0.1
"""What the waiting of a stage counts whose run cannot meet its deadline any more."""

DISPLACES: Final = 8.0
"""How many times what others miss counts where a model that is served somewhere wants more."""

LEAD_S: Final = 1.0
"""A wake for what is expected begins so many seconds before it must."""

LEAST_S: Final = 1.0
"""Stage-seconds that an action must save beyond its cost."""

RELIEF: Final = 0.2
"""Share of the work on the GPUs concerned that another layout of them must save, to be worth the change."""

FULL: Final = 0.8
"""Share of its KV memory that a model for which stages wait has reserved when it lacks KV memory."""

LOOK_AT: Final = 8
"""GPUs, the idlest, that are thought of for a model that is served elsewhere."""

REBUDGET: Final = 0.25
"""KV budgets are changed where one is off by this share of what there is to share."""

KV_LEAST: Final = 0.05
"""Share of a GPU's KV memory that a model gets beyond its floor though it never used any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resident:
    """A model as it is on a GPU that it fits."""

    model: str
    tier: Tier
    #: Where it is going: other than ``tier`` while it drains, sleeps or wakes.
    to: Tier
    #: HBM of weights and server while awake; host memory while sleeping.
    hbm_bytes: int
    ram_bytes: int
    #: KV memory of one request of the longest length: no server starts with less.
    kv_floor_bytes: int
    #: Its KV memory now, what of it is reserved, and what it usually reserves.
    kv_bytes: int = 0
    reserved_bytes: int = 0
    usual_bytes: float = 0.0
    running: int = 0
    #: Share of recent time in which it served anything.
    busy: float = 0.0
    #: When it last had a stage, and when it last came to its tier.
    used_at_s: float = -math.inf
    changed_at_s: float = -math.inf
    #: Predicted seconds until all that it runs has ended.
    drain_s: float = 0.0
    #: It runs the parent of a stage that waits: it must not be drained for anything.
    holds_parent: bool = False
    #: Seconds from its tier to the GPU; to sleep and back, by level.
    wake_s: float = 0.0
    sleep_s: tuple[float, float] = (0.0, 0.0)
    drop_s: tuple[float, float] = (0.0, 0.0)

    @property
    def awake(self) -> bool:
        """It takes stages."""
        return self.tier == "gpu" == self.to

    @property
    def coming(self) -> bool:
        return self.tier != "gpu" == self.to

    @property
    def in_hbm(self) -> bool:
        return "gpu" in (self.tier, self.to)

    @property
    def least_bytes(self) -> int:
        """HBM that it cannot give away while it is there."""
        return self.hbm_bytes + max(self.kv_floor_bytes, self.reserved_bytes) if self.in_hbm else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuState:
    """One GPU with every model that fits it."""

    gpu_id: str
    usable_bytes: int
    residents: Sequence[Resident]
    #: Host memory of its node that holds no sleeping model.
    ram_free_bytes: int = 0
    #: The model that room is being made for.
    promised: str = ""

    @property
    def room_bytes(self) -> int:
        """HBM that a further model can have."""
        return self.usable_bytes - sum(r.least_bytes for r in self.residents)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """Who wants a model. Seconds that stages waited are sums over those."""

    model: str
    #: Stages that wait: when the first was pushed, and the smallest moment in the policy's own order.
    waiting: int = 0
    waited_s: float = 0.0
    oldest_at_s: float = math.inf
    due_at_s: float = math.inf
    #: Of these, those whose run cannot meet its deadline any more.
    late: int = 0
    late_waited_s: float = 0.0
    #: Learned: stages that come in a second, and the seconds of service that they ask for.
    stages_per_s: float = 0.0
    work: float = 0.0
    #: What running runs are expected to call: (in how many seconds, expected number).
    foreseen: Sequence[tuple[float, float]] = ()

    @property
    def counts(self) -> float:
        """Stages that wait, those that are late for little."""
        return self.waiting - (1.0 - LATE_COUNTS) * self.late

    @property
    def counts_s(self) -> float:
        """Seconds that they waited."""
        return self.waited_s - (1.0 - LATE_COUNTS) * self.late_waited_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """All that a decision may look at."""

    gpus: Sequence[GpuState]
    demands: Mapping[str, Demand]


@dataclass(frozen=True, slots=True)
class Wake:
    """Bring a model to a GPU. Where the room is not there yet it is promised to it."""

    gpu_id: str
    model: str


@dataclass(frozen=True, slots=True)
class Sleep:
    """Give a model no more stages there, and put it to sleep once it is idle. ``promised``: the model that gets the room."""

    gpu_id: str
    model: str
    to: Tier
    promised: str = ""


@dataclass(frozen=True, slots=True)
class Budget:
    """KV memory that a model shall have. What of the old one is reserved is given up as its stages end."""

    gpu_id: str
    model: str
    kv_bytes: int


Action = Wake | Sleep | Budget
Place = Callable[[Board, float], list[Action]]
"""(board, now_s) -> what to do, in order."""


# -- ours ----------------------------------------------------------------------------------------------------------------
def by_value(board: Board, now_s: float, *, foresee: bool = True) -> list[Action]:
    """Keep awake what is worth most: predicted demand times the seconds that being awake saves it.

    - A model that nobody serves is woken where that costs least: its own wake and drain, what those that must sleep for it
      will miss (the stages that come until they may be back, times the seconds that these wait), and the turns on the GPU that
      it takes from others. It is done as soon as what its stages have waited, and would wait for the wake, is more than what
      others will miss: so it waits no longer than about twice what was best, as who rents skis until the rent has come to
      their price. Stages that running runs are expected to call count by their chance, as far as a wake now saves them waiting;
      for these alone nothing sleeps that serves.
    - A model that is served gets a further GPU, where there is room for it, if that spares waiting or turns: then it is a
      replica of a hot model, or leaves the GPU that is crowded. Others sleep for that, or for KV memory beside them, only
      while nobody waits for a model that is nowhere: so displaced models cannot displace each other round and round.
    - KV memory goes to those that use it.

    Bounds: no model sleeps within its dwell (`DWELL`, `MIN_DWELL_S`); where a stage waited `PATIENCE_S` only that counts.
    """
    actions: list[Action] = []
    taken = _keep_promises(board, actions)
    crowd = _Crowd(board)
    coming = {r.model for g in board.gpus for r in g.residents if r.coming} | {g.promised for g in board.gpus}
    calm = not coming - {""} and all(crowd.replicas.get(d.model) for d in board.demands.values() if d.waiting)
    idlest: list[GpuState] = []
    for demand in sorted(board.demands.values(), key=lambda d: (-d.waited_s, -d.waiting, d.model)):
        if demand.model in coming:
            continue
        if crowd.replicas.get(demand.model):
            idlest = idlest or sorted(board.gpus, key=lambda g: (crowd.turns[g.gpu_id], g.gpu_id))[:LOOK_AT]
            options = [_relief(demand, g, board, crowd, now_s, calm=calm) for g in idlest if g.gpu_id not in taken]
        else:
            free = (g for g in board.gpus if g.gpu_id not in taken)
            options = [_option(demand, g, board, crowd, now_s, foresee=foresee) for g in free]
        best = min((o for o in options if o), key=lambda o: (o.rank, o.gpu.gpu_id), default=None)
        if best and best.gain_s > LEAST_S:
            taken.add(best.gpu.gpu_id)
            _make(best, demand.model, actions)
    for gpu in board.gpus:
        if gpu.gpu_id not in taken:
            actions += _leave(gpu, crowd, now_s) or _rebudget(gpu)
    return actions


without_foresight: Final[Place] = functools.partial(by_value, foresee=False)
"""Ours, but nothing is woken before somebody waits for it."""


@dataclass(frozen=True, slots=True)
class _Option:
    gpu: GpuState
    victims: tuple[Resident, ...]
    #: Among the GPUs for a model, smaller first.
    rank: float
    gain_s: float


class _Crowd:
    """Who takes turns with whom. A model's load: how many of its stages would run at a time were it alone on a GPU, in equal
    parts on those where it is awake; its turns: the chance that any does. A stage takes as many times its seconds as engines
    have turns there.
    """

    def __init__(self, board: Board) -> None:
        self.replicas: dict[str, list[GpuState]] = {}
        self.room_bytes = {g.gpu_id: g.room_bytes for g in board.gpus}
        here: dict[str, list[str]] = {}
        for gpu in board.gpus:
            here[gpu.gpu_id] = [r.model for r in gpu.residents if r.to == "gpu"]
            for r in gpu.residents:
                if r.awake:
                    self.replicas.setdefault(r.model, []).append(gpu)
        busy = {g.gpu_id: sum(r.busy for r in g.residents) for g in board.gpus}
        self.loads = {
            d.model: d.work / max(1.0, min((busy[g.gpu_id] for g in self.replicas.get(d.model, ())), default=1.0))
            for d in board.demands.values()
        }
        self.here = {
            g: {m: self.loads.get(m, 0.0) / len(self.replicas.get(m, ".")) for m in models}
            for g, models in here.items()
        }
        self.turns = {g: sum(map(_turn, parts.values())) for g, parts in self.here.items()}

    def cost(self, gpus: Iterable[str], model: str, to: Iterable[str]) -> float:
        """Stage-seconds a second on these GPUs if a model ran on those of them in ``to``."""
        to = set(to)
        part = self.loads.get(model, 0.0) / max(1, len(to))
        total = 0.0
        for gpu_id in gpus:
            parts = {m: x for m, x in self.here[gpu_id].items() if m != model}
            if gpu_id in to:
                parts[model] = part
            turns = sum(map(_turn, parts.values()))
            total += sum(x * (1.0 + turns - _turn(x)) for x in parts.values())
        return total


def _turn(load: float) -> float:
    return 1.0 - math.exp(-load)


def _option(
    demand: Demand, gpu: GpuState, board: Board, crowd: _Crowd, now_s: float, *, foresee: bool
) -> _Option | None:
    """What waking a model that nobody serves would be on a GPU; None where it cannot be, or nobody wants it."""
    own = _of(gpu, demand.model)
    if own is None or own.in_hbm or not (demand.waiting or (foresee and demand.foreseen)):
        return None
    found = _victims(gpu, own, board, crowd, now_s)
    if found is None:
        return None
    victims, ready_s, cost_s = found
    waits_s = demand.counts_s + demand.counts * ready_s
    if foresee:
        soon_s = sum(n * min(ready_s, in_s) for in_s, n in demand.foreseen if in_s <= ready_s + LEAD_S)
        waits_s += soon_s if not any(v.running for v in victims) else 0.0
    if now_s - demand.oldest_at_s >= PATIENCE_S:
        waits_s += cost_s + 2 * LEAST_S
    here = gpu.gpu_id
    turns_s = HORIZON_S * (crowd.cost([here], demand.model, [here]) - crowd.cost([here], demand.model, []))
    arrivals = demand.waiting + demand.stages_per_s * HORIZON_S
    return _Option(gpu, victims, cost_s + turns_s + arrivals * ready_s, waits_s - cost_s)


def _relief(demand: Demand, gpu: GpuState, board: Board, crowd: _Crowd, now_s: float, *, calm: bool) -> _Option | None:
    """What a further GPU would be to a model that is served: fewer turns, where there is room; an end of waiting, for which
    others may have to sleep. On a GPU where it is: what KV memory would be that another one has there.
    """
    own = _of(gpu, demand.model)
    if own is None or (own.in_hbm and not (own.awake and own.reserved_bytes > FULL * own.kv_bytes)):
        return None
    fits = not own.in_hbm and own.hbm_bytes + own.kv_floor_bytes <= crowd.room_bytes[gpu.gpu_id]
    if not fits and not (demand.waiting and calm):
        return None
    found = _victims(gpu, own, board, crowd, now_s)
    if found is None:
        return None
    victims, ready_s, cost_s = found
    gain_s = min(demand.counts_s, demand.counts * (HORIZON_S + ready_s)) - DISPLACES * cost_s
    if not victims:
        now = [g.gpu_id for g in crowd.replicas[demand.model]]
        both = [*now, gpu.gpu_id]
        was = crowd.cost(both, demand.model, now)
        least = min(
            crowd.cost(both, demand.model, to) for to in (both, *([g for g in both if g != left] for left in now))
        )
        gain_s += HORIZON_S * (was - least - RELIEF * was)
    return _Option(gpu, victims, -gain_s, gain_s)


def _leave(gpu: GpuState, crowd: _Crowd, now_s: float) -> list[Action]:
    """Put a model to sleep where another GPU serves it and everyone is better off."""
    for r in gpu.residents:
        places = [g.gpu_id for g in crowd.replicas.get(r.model, ())]
        if len(places) < 2 or not r.awake or r.holds_parent or now_s - r.changed_at_s < dwell_s(r):
            continue
        was, new = (
            crowd.cost(places, r.model, places),
            crowd.cost(places, r.model, [g for g in places if g != gpu.gpu_id]),
        )
        if was - new > RELIEF / 2 * was and HORIZON_S * (was - new) > LEAST_S:
            for other in crowd.replicas.pop(r.model):  # one at a time
                crowd.here[other.gpu_id].pop(r.model, None)
            return [Sleep(gpu.gpu_id, r.model, _away(r, gpu)[0])]
    return []


def _missed_s(v: Resident, board: Board, crowd: _Crowd, away_s: float) -> float:
    """Stage-seconds that those wait who want a model that is put to sleep, and can be back after ``away_s`` at the earliest."""
    demand = board.demands.get(v.model) or Demand(model=v.model)
    away_s += v.drain_s
    places = crowd.replicas.get(v.model, ())
    if len(places) > 1:  # others serve them, in more turns
        return away_s * (demand.work + demand.counts) / len(places) / 2
    soon = sum(n for in_s, n in demand.foreseen if in_s <= away_s)
    back_s = min(v.sleep_s[1], v.drop_s[1])
    return demand.counts * (away_s + back_s) + max(demand.stages_per_s * away_s, soon) * (away_s / 2 + back_s)


def _victims(
    gpu: GpuState, own: Resident, board: Board, crowd: _Crowd, now_s: float
) -> tuple[tuple[Resident, ...], float, float] | None:
    """Who must sleep so that a model has room: those who miss least, byte for byte; in how many seconds it would serve, and
    what they would miss until it may sleep again. None: there is no way.
    """
    lacking = 1 if own.in_hbm else own.hbm_bytes + own.kv_floor_bytes - crowd.room_bytes[gpu.gpu_id]
    if lacking <= 0:
        return (), own.wake_s, 0.0
    away_s = (own.wake_s if not own.in_hbm else 0.0) + dwell_s(own)
    able = [
        (_missed_s(r, board, crowd, away_s), r)
        for r in gpu.residents
        if r.awake and r is not own and not r.holds_parent and now_s - r.changed_at_s >= dwell_s(r)
    ]
    found: list[tuple[float, Resident]] = []
    for missed_s, v in sorted(able, key=lambda mv: (mv[0] / mv[1].least_bytes, mv[1].model)):
        found.append((missed_s, v))
        lacking -= v.least_bytes
        if lacking <= 0:
            break
    if lacking > 0:
        return None
    for each in tuple(found):  # the last one taken may make an earlier one needless
        if lacking + each[1].least_bytes <= 0:
            found.remove(each)
            lacking += each[1].least_bytes
    ready_s = own.wake_s + max(v.drain_s + _away(v, gpu)[1] for _, v in found)
    return tuple(v for _, v in found), ready_s, sum(missed_s for missed_s, _ in found)


def dwell_s(r: Resident) -> float:
    """Seconds that a model stays awake once it is."""
    return max(MIN_DWELL_S, DWELL * min(sum(r.sleep_s), sum(r.drop_s)))


def _make(option: _Option, model: str, actions: list[Action]) -> None:
    own = _of(option.gpu, model)
    if own and own.in_hbm:  # it gets their KV memory
        actions += [Sleep(option.gpu.gpu_id, v.model, _away(v, option.gpu)[0]) for v in option.victims]
    else:
        _bring(option.gpu, option.victims, model, actions)


def _rebudget(gpu: GpuState) -> list[Action]:
    """Give those that are awake the KV memory that they use, where what they have is far from it."""
    shares = budgets(gpu)
    if not shares or gpu.promised:
        return []
    left = sum(shares.values())
    off = max(abs(shares[r.model] - r.kv_bytes) for r in gpu.residents if r.model in shares)
    return [Budget(gpu.gpu_id, m, b) for m, b in shares.items()] if off > REBUDGET * left else []


# -- common to all -------------------------------------------------------------------------------------------------------
def budgets(gpu: GpuState, wake: str = "", without: Iterable[Resident] = (), *, even: bool = False) -> dict[str, int]:
    """KV memory of each model that is awake, or will be with ``wake`` there and ``without`` gone: its floor, and of the rest by
    what it usually uses.

    ``even``: the rest in equal parts. What drains keeps what it has reserved.
    """
    gone = {v.model for v in without}
    here = [r for r in gpu.residents if (r.to == "gpu" and r.model not in gone) or r.model == wake]
    going = sum(r.least_bytes for r in gpu.residents if r.in_hbm and r.to != "gpu" and r.model != wake)
    rest = gpu.usable_bytes - going - sum(r.hbm_bytes + r.kv_floor_bytes for r in here)
    if rest < 0 or not here:
        return {}
    least = max(1.0, KV_LEAST * rest)
    weights = {r.model: 1.0 if even else r.usual_bytes + least for r in here}
    total = sum(weights.values())
    return {r.model: r.kv_floor_bytes + int(rest * weights[r.model] / total) for r in here}


def _bring(
    gpu: GpuState, victims: Sequence[Resident], model: str, actions: list[Action], *, even: bool = False
) -> None:
    """Have a model on a GPU: some sleep for it, and the others are left no KV memory that it needs."""
    actions += [Sleep(gpu.gpu_id, v.model, _away(v, gpu)[0], promised=model) for v in victims]
    actions += [Budget(gpu.gpu_id, m, b) for m, b in budgets(gpu, model, victims, even=even).items() if m != model]
    if not victims:
        actions.append(Wake(gpu.gpu_id, model))


def _keep_promises(board: Board, actions: list[Action], *, even: bool = False) -> set[str]:
    """Wake what room was made for, where it is there now. Return the GPUs that are not to be touched."""
    taken: set[str] = set()
    for gpu in board.gpus:
        own = _of(gpu, gpu.promised) if gpu.promised else None
        if own is not None:
            taken.add(gpu.gpu_id)
            if own.hbm_bytes + own.kv_floor_bytes <= gpu.room_bytes:
                _bring(gpu, (), own.model, actions, even=even)
    return taken


def _of(gpu: GpuState, model: str) -> Resident | None:
    return next((r for r in gpu.residents if r.model == model), None)


def _away(r: Resident, gpu: GpuState) -> tuple[Tier, float]:
    """The tier to put a model into, and the seconds that it takes: the fewest there and back that host memory allows."""
    if r.ram_bytes <= gpu.ram_free_bytes and sum(r.sleep_s) <= sum(r.drop_s):
        return "sleeping", r.sleep_s[0]
    return "dropped", r.drop_s[0]


# -- what ours is compared with --------------------------------------------------------------------------------------------
def lru(board: Board, now_s: float) -> list[Action]:
    """Wake on demand, first come first served; where there is no room, whoever was used least recently sleeps.

    Idle models first; where none is, the one that is awake for longest is drained. KV memory in equal parts.
    """
    actions: list[Action] = []
    taken = _keep_promises(board, actions, even=True)
    for demand in _unserved(board):
        able = [(g, r) for g in board.gpus if g.gpu_id not in taken and (r := _of(g, demand.model)) and not r.in_hbm]
        fits = [(g, r) for g, r in able if r.hbm_bytes + r.kv_floor_bytes <= g.room_bytes]
        if fits:
            gpu, _ = min(fits, key=lambda gr: (gr[1].wake_s, -gr[0].room_bytes, gr[0].gpu_id))
            taken.add(gpu.gpu_id)
            _bring(gpu, (), demand.model, actions, even=True)
            continue
        found: list[tuple[bool, float, str, GpuState, list[Resident]]] = []
        for gpu, own in able:
            lacking, victims = own.hbm_bytes + own.kv_floor_bytes - gpu.room_bytes, list[Resident]()
            there = [r for r in gpu.residents if r.awake and not r.holds_parent]
            for v in sorted(there, key=lambda v: (v.running > 0, v.changed_at_s if v.running else v.used_at_s)):
                victims.append(v)
                lacking -= v.least_bytes
                if lacking <= 0:
                    last = v.changed_at_s if v.running else v.used_at_s
                    found.append((v.running > 0, last, gpu.gpu_id, gpu, victims))
                    break
        if found:
            _, _, _, gpu, victims = min(found, key=lambda f: f[:3])
            taken.add(gpu.gpu_id)
            _bring(gpu, victims, demand.model, actions, even=True)
    del now_s
    return actions


def static(board: Board, now_s: float) -> list[Action]:
    """A static partition: every model stays where the fleet file starts it, with its equal part of that GPU's KV memory."""
    del board, now_s
    return []


def no_colocation(board: Board, now_s: float) -> list[Action]:
    """One model on a GPU at a time, with all of its KV memory; models take turns in the order of their first waiting stage."""
    del now_s
    return _exclusive(board, lambda d: d.oldest_at_s)


def qlm(board: Board, now_s: float) -> list[Action]:
    """One model on a GPU at a time; its waiting group is served before a swap, unless another model's is due earlier.

    After QLM (arXiv 2407.00047): request groups in order of their deadlines, swaps between groups only. Goes with the order
    of the same name, whose moments are those of groups.
    """
    del now_s
    return _exclusive(board, lambda d: d.due_at_s)


def _exclusive(board: Board, turn: Callable[[Demand], float]) -> list[Action]:
    actions: list[Action] = []
    taken = _keep_promises(board, actions, even=True)
    nobody = Demand(model="")
    waiting = {d.model for d in board.demands.values() if d.waiting}
    unserved = _unserved(board, turn)
    also = sorted(waiting - {d.model for d in unserved})
    for demand in (*unserved, *(board.demands[m] for m in also)):
        found: list[tuple[float, float, int, float, str, GpuState, list[Resident]]] = []
        for gpu in board.gpus:
            own = _of(gpu, demand.model)
            if own is None or own.in_hbm or gpu.gpu_id in taken:
                continue
            there = [r for r in gpu.residents if r.in_hbm]
            if any(not r.awake or r.holds_parent for r in there):
                continue
            theirs = [board.demands.get(r.model, nobody) for r in there]
            first = min((turn(d) for d in theirs if d.waiting), default=math.inf)
            busy = max((r.drain_s for r in there if r.running), default=0.0)
            another = demand.model in also  # a replica takes what nobody uses
            if first > turn(demand) and not (another and (busy or first < math.inf)):
                found.append((-first, busy, len(there), own.wake_s, gpu.gpu_id, gpu, there))
        if found:
            *_, gpu, there = min(found, key=lambda f: f[:5])
            taken.add(gpu.gpu_id)
            _bring(gpu, there, demand.model, actions, even=True)
    return actions


def _unserved(board: Board, turn: Callable[[Demand], float] = lambda d: d.oldest_at_s) -> list[Demand]:
    """Models that stages wait for and that nobody serves or is about to, in turn."""
    there = {r.model for g in board.gpus for r in g.residents if r.awake or r.coming} | {g.promised for g in board.gpus}
    return sorted(
        (d for d in board.demands.values() if d.waiting and d.model not in there), key=lambda d: (turn(d), d.model)
    )
