"""The scheduler's part that has models awake where they are wanted most.

Nodes report what is true (`nodes.NodeReport`); reports and demand make the board that `policy.place` decides on, the same that
the simulator makes (`simulator.gpus`); what is decided is written as wishes (`nodes.Wanted`), which nodes carry out.

What is promised:

- An engine that is to leave the GPU, or to restart, gets no more stages first (`takes`, which the scheduler publishes), and its
  node is told once nothing is reserved there any more.
- A wake that failed is not tried again there for `BACK_OFF_S`, twice as long each time; the model may go elsewhere meanwhile.
- What was told outlives a scheduler: the next one goes on from reports and from what nodes were told last. What was about to be
  told is decided anew.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from maestro_agents.core import EngineSpec, Observation, Prediction, RunEnd, Status, Ticket
from maestro_agents.nodes import EngineReport, GpuReport, NodeReport, Tier, Want, Wanted
from maestro_agents.policy.ageing import rejuvenate
from maestro_agents.policy.demand import ASK_S, Demands, Use
from maestro_agents.policy.placement import Action, Board, GpuState, Place, Resident, Sleep, Wake
from maestro_agents.policy.priority import end_s
from maestro_agents.ports import Ledger, Queue, Running
from maestro_agents.workflow import TOUCH_S, Workflows

log = logging.getLogger("maestro.placer")

LOOK_S: Final = 0.1
"""Shortest time between two readings of the reports."""

RUNNING_S: Final = 1.0
"""Shortest time between two readings of what runs, where nothing waits for it."""

BACK_OFF_S: Final = 30.0
LONGEST_BACK_OFF_S: Final = 600.0

GRACE_S: Final = 2.0
"""So long after a node fell silent nothing is decided: after an outage of the queue all have, and come back one by one."""

PROMISE_S: Final = 30.0
"""A model gets room that was promised to it within so many seconds once nobody has to leave for it, or the promise is void."""

_WITHOUT_SERVER: Final = frozenset({"host", "disk"})
"""Which of the two it is is the page cache's business."""

PAUSED: Final = frozenset({"paused", "preempting"})
"""Levels of a GPU (`nodes.GpuReport`) at which it takes no more stages."""

MAX_STAGES: Final = 100_000
MAX_RUNS: Final = 10_000

Predict = Callable[[Sequence[Ticket]], Mapping[str, Prediction]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """What waits: stages in any order, what they will cost, the moments of those that have new ones, how many more there are."""

    tickets: Sequence[Ticket] = ()
    predictions: Mapping[str, Prediction] = field(default_factory=dict[str, Prediction])
    moments: Mapping[str, float] = field(default_factory=dict[str, float])
    #: Model -> stages that wait beyond those.
    more: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(slots=True, eq=False)
class _Seat:
    """A model on a GPU, as its node said last, and what is wanted of it."""

    node_id: str
    report: EngineReport
    #: Where it shall be; None: where it is.
    want: Tier | None = None
    since_s: float = -math.inf
    #: Its node knows of that, or is to be told at once. Else the engine takes no more stages, and is waited for.
    told: bool = True
    #: How often it shall have been restarted.
    restarts: int = 0
    #: It is to come once there is room.
    promised: bool = False
    #: KV memory that it shall have in the end, and is to have now; 0: as it is.
    kv_bytes: int = 0
    kv_now_bytes: int = 0
    use: Use = field(default_factory=Use)

    @property
    def engine_id(self) -> str:
        return self.report.spec.engine_id

    @property
    def rests(self) -> bool:
        return self.report.tier == self.report.to

    @property
    def awake(self) -> bool:
        return self.report.tier == "gpu" == self.report.to

    @property
    def coming(self) -> bool:
        return self.want == "gpu" != self.report.tier and not self.promised

    @property
    def going(self) -> bool:
        return self.to != "gpu" == self.report.tier

    @property
    def in_hbm(self) -> bool:
        return self.coming or "gpu" in {self.report.tier, self.report.to}

    @property
    def to(self) -> Tier:
        """Where it is going, by its node or by us."""
        if self.promised:
            return self.report.tier
        return self.want or self.report.to

    @property
    def restarting(self) -> bool:
        return self.restarts > self.report.rejuvenation

    @property
    def takes(self) -> bool:
        return self.awake and self.to == "gpu" and not self.restarting

    @property
    def kv_held_bytes(self) -> int:
        """HBM that its KV memory takes now."""
        if not self.in_hbm or (self.going and not self.awake):
            return 0
        return max(self.report.kv_bytes, self.report.kv_floor_bytes if self.coming else 0)


class _Off(NamedTuple):
    """Moves of an engine that failed in a row, when the last did, and until when there is no further one."""

    times: int
    failed_at_s: float
    until_s: float


_NEVER: Final = _Off(0, -math.inf, -math.inf)


class Placer:
    """What the leader knows of nodes, and what it wants of them. Moments are the pool's clock's and do not go back."""

    def __init__(self, queue: Queue, place: Place, workflows: Workflows) -> None:
        self._queue = queue
        self._place = place
        self._nodes: dict[str, NodeReport] = {}
        self._seats: dict[str, _Seat] = {}
        #: GPU, model -> the seat there, as far as the board has it.
        self._at: dict[tuple[str, str], _Seat] = {}
        self._gpus: dict[str, GpuReport] = {}
        #: Node -> what it was told, under which epoch.
        self._told: dict[str, Wanted] = {}
        self._off: dict[str, _Off] = {}
        self._demands = Demands()
        self._runs = _Runs(self._demands, workflows)
        #: Stages that were counted as demand -> seconds that they were predicted to take.
        self._services: OrderedDict[str, float] = OrderedDict()
        self._running: Sequence[Running] = ()
        self._looked_at_s = self._asked_at_s = self._ran_at_s = -math.inf
        self._wait_until_s = -math.inf

    # -- what nodes say ------------------------------------------------------------------------------------------------
    async def look(self, now_s: float, *, leading: bool) -> bool:
        """Read what nodes say. ``leading``: and what they were told, where that is not known. False: not yet again."""
        if now_s - self._looked_at_s < LOOK_S:
            return False
        self._looked_at_s = now_s
        nodes = {r.node_id: r for r in await self._queue.reports(now_s)}
        for silent in self._nodes.keys() - nodes.keys():
            log.warning("node %s is silent: its engines count as dead", silent)
            self._told.pop(silent, None)
            self._wait_until_s = now_s + GRACE_S
        self._nodes = nodes
        here = {e.spec.engine_id: r.node_id for r in nodes.values() for e in r.engines}
        self._seats = {e: s for e, s in self._seats.items() if here.get(e) == s.node_id}
        self._gpus = {g.gpu_id: g for r in nodes.values() for g in r.gpus}
        for node_id, report in nodes.items():
            if leading and node_id not in self._told:
                found = await self._queue.wanted(node_id, known="", timeout_s=0.0)
                self._told[node_id] = found[1] if found else Wanted(epoch=-1)
                self._adopt(report, self._told[node_id])
            for e in report.engines:
                self._hear(node_id, e)
        return True

    def forget(self) -> None:
        """Somebody else may have led meanwhile: begin with what nodes say, and what they were told last."""
        self._told, self._seats = {}, {}
        self._looked_at_s = -math.inf

    def _adopt(self, report: NodeReport, told: Wanted) -> None:
        """Go on with what a node was told last."""
        for e in report.engines:
            seat = self._seats[e.spec.engine_id] = _Seat(report.node_id, e, restarts=e.rejuvenation)
            if (wish := told.engines.get(e.spec.engine_id)) is not None:
                seat.want, seat.kv_bytes, seat.kv_now_bytes = wish.tier, wish.kv_bytes, wish.kv_bytes
                seat.restarts = max(seat.restarts, wish.rejuvenation)
                seat.promised = wish.tier == "gpu" != e.tier and seat.rests
        for e in report.engines:
            seat = self._seats[e.spec.engine_id]
            seat.promised = seat.promised and not self._fits(seat)

    def _hear(self, node_id: str, e: EngineReport) -> None:
        seat = self._seats.get(e.spec.engine_id)
        if seat is None:
            seat = self._seats[e.spec.engine_id] = _Seat(node_id, e, restarts=e.rejuvenation)
        seat.report = e
        if e.to == "gpu" or e.tier == "gpu":
            seat.promised = False
        if e.failed and e.failed_at_s > seat.since_s and seat.rests:
            self._failed(seat)
        elif seat.rests and e.tier != "gpu" and seat.want not in {None, "gpu"}:
            seat.told, seat.kv_bytes, seat.kv_now_bytes = True, 0, 0
            if not {seat.want, e.tier} <= _WITHOUT_SERVER:
                seat.want = e.tier  # it is asleep, in one way or another
        elif e.to == "gpu" and seat.want is None:
            seat.want = "gpu"
        if seat.takes and e.changed_at_s > self._off.get(seat.engine_id, _NEVER).failed_at_s:
            self._off.pop(seat.engine_id, None)

    def _failed(self, seat: _Seat) -> None:
        """Its last move failed: it is where it was, and stays there for a while."""
        e = seat.report
        before = self._off.get(seat.engine_id, _NEVER).times
        off_s = min(BACK_OFF_S * 2.0**before, LONGEST_BACK_OFF_S)
        self._off[seat.engine_id] = _Off(before + 1, e.failed_at_s, e.failed_at_s + off_s)
        seat.since_s = e.failed_at_s
        if seat.want in {None, e.tier} and not seat.restarting:
            return
        log.warning("%s did not come to %s (%s); not again for %.0f s", seat.engine_id, seat.want, e.failed, off_s)
        seat.want = e.tier
        seat.promised, seat.told, seat.restarts = False, True, e.rejuvenation
        seat.kv_bytes = seat.kv_now_bytes = 0
        if e.tier == "gpu":  # what was to have its room does not get it
            for other in self._seats.values():
                if other.promised and other.report.gpu_id == e.gpu_id:
                    other.promised, other.want = False, other.report.tier

    # -- what the scheduler asks ---------------------------------------------------------------------------------------
    @property
    def engines(self) -> dict[str, EngineSpec]:
        """The engines of nodes that speak, awake or not, with the KV memory that may be promised there."""
        found: dict[str, EngineSpec] = {}
        for engine_id, seat in self._seats.items():
            spec, has = seat.report.spec, seat.report.kv_bytes
            kv = spec.kv_bytes or has  # more than it has, where its node over-subscribes
            if has > seat.kv_bytes > 0:
                kv = kv * seat.kv_bytes // has
            found[engine_id] = dataclasses.replace(spec, kv_bytes=kv)
        return found

    def runs(self, engine_id: str) -> bool:
        """Its server is up, weights in HBM, as far as nodes have a say in it."""
        seat = self._seats.get(engine_id)
        return seat is None or seat.report.tier == "gpu"

    def beside(self, engine_id: str) -> int:
        """Engines that are awake on its GPU, itself included."""
        seat = self._seats.get(engine_id)
        here = () if seat is None else (s for s in self._seats.values() if s.report.gpu_id == seat.report.gpu_id)
        return max(1, sum(s.report.tier == "gpu" for s in here))

    def takes(self, engine_id: str) -> bool:
        """It may be given stages, as far as nodes and placement have a say in it."""
        seat = self._seats.get(engine_id)
        return seat is None or (seat.takes and not self._paused(seat.report.gpu_id))

    def _paused(self, gpu_id: str) -> bool:
        return gpu_id in self._gpus and self._gpus[gpu_id].level in PAUSED

    # -- what is learned -----------------------------------------------------------------------------------------------
    def observe(self, entry: Observation | RunEnd, now_s: float) -> None:
        """A stage, or a run, has ended."""
        if isinstance(entry, RunEnd):
            self._runs.run_ended(entry.run_id)
        elif not entry.observed:
            self._runs.ended(entry)
            if entry.stage_id not in self._services:
                self._comes(entry.stage_id, entry.model, entry.service_s, min(entry.finished_at_s, now_s))

    def _comes(self, stage_id: str, model: str, service_s: float, at_s: float) -> None:
        self._services[stage_id] = service_s
        if len(self._services) > MAX_STAGES:
            self._services.popitem(last=False)
        self._demands.comes(model, service_s, at_s)

    # -- decide --------------------------------------------------------------------------------------------------------
    def asks(self, now_s: float) -> bool:
        """It is time for another decision."""
        return bool(self._gpus) and now_s - self._asked_at_s >= ASK_S and now_s >= self._wait_until_s

    async def decide(self, waiting: Waiting, fleet: Collection[EngineSpec], predict: Predict, now_s: float) -> None:
        """Ask the policy and take down what it wants. ``fleet``: all engines. Who is to leave takes no more stages from now on."""
        self._asked_at_s = now_s
        ledger = await self._queue.ledger()
        if now_s - self._ran_at_s >= RUNNING_S or any(t.nested for t in waiting.tickets):
            self._ran_at_s = now_s
            self._running = await self._queue.running()
        self.told_of(waiting, ledger, predict, now_s)
        for action in self._place(self.board(waiting, fleet, now_s), now_s):
            self._do(action, now_s)
        self._rejuvenate(waiting, now_s)
        for gpu_id in self._gpus:
            self._settle(gpu_id)

    def told_of(self, waiting: Waiting, ledger: Ledger, predict: Predict, now_s: float) -> None:
        """Bring demand and use to what is so now."""
        self._demands.nobody_waits()
        for t in sorted(waiting.tickets, key=lambda t: t.pushed_at_s):
            p = waiting.predictions[t.stage_id]
            self._demands.waits(t.stage_id, t.model, t.pushed_at_s, t.deadline_at_s - end_s(p))
            if t.stage_id not in self._services:
                self._runs.begins(t)
                self._comes(t.stage_id, t.model, p.service_s, now_s)
        for model, n in waiting.more.items():
            self._demands.more_wait(model, n)
        new = [r.ticket for r in self._running if r.ticket.stage_id not in self._services]
        predicted: Mapping[str, Prediction] = predict(new) if new else {}
        for t in new:
            self._runs.begins(t)
            self._comes(t.stage_id, t.model, predicted[t.stage_id].service_s, now_s)
        for r in self._running:
            self._runs.runs(r.ticket, self._ends_at_s(r))
        for engine_id, seat in self._seats.items():
            running, reserved = ledger.slots.get(engine_id, 0), ledger.kv_bytes.get(engine_id, 0)
            if running or seat.use.running or reserved != seat.use.reserved_bytes:
                seat.use.becomes(running, reserved, now_s)

    def _ends_at_s(self, r: Running) -> float:
        return r.granted_at_s + self._services.get(r.ticket.stage_id, 0.0)

    def board(self, waiting: Waiting, fleet: Collection[EngineSpec], now_s: float) -> Board:
        """What the policy is told."""
        nested = {t.run_id for t in waiting.tickets if t.nested}
        ends: defaultdict[str, float] = defaultdict(lambda: -math.inf)
        parents: set[str] = set()
        for r in self._running:
            ends[r.engine_id] = max(ends[r.engine_id], self._ends_at_s(r))
            if r.ticket.run_id in nested:
                parents.add(r.engine_id)
        due: dict[str, float] = {}
        for t in waiting.tickets:
            due[t.model] = min(due.get(t.model, math.inf), waiting.moments.get(t.stage_id, t.due_at_s))
        self._at = {}
        gpus: list[GpuState] = []
        for node in self._nodes.values():
            for g in node.gpus:
                here = [s for s in self._seats.values() if s.report.gpu_id == g.gpu_id and self._possible(s, now_s)]
                self._at |= {(g.gpu_id, s.report.spec.model): s for s in here}
                gpus.append(
                    GpuState(
                        gpu_id=g.gpu_id,
                        usable_bytes=g.usable_bytes,
                        residents=[
                            self._resident(s, ends[s.engine_id] - now_s, now_s, holds_parent=s.engine_id in parents)
                            for s in here
                        ],
                        ram_free_bytes=node.ram_free_bytes,
                        promised=next((s.report.spec.model for s in here if s.promised), ""),
                    )
                )
        return Board(
            gpus=[*gpus, *self._beside(fleet)], demands=self._demands.of(now_s, lambda m: due.get(m, math.inf))
        )

    def _possible(self, seat: _Seat, now_s: float) -> bool:
        """It is there, or may come there now."""
        if seat.in_hbm or seat.promised:
            return True
        return not self._is_off(seat, now_s) and not self._paused(seat.report.gpu_id)

    def _is_off(self, seat: _Seat, now_s: float) -> bool:
        return now_s < self._off.get(seat.engine_id, _NEVER).until_s

    def _beside(self, fleet: Iterable[EngineSpec]) -> list[GpuState]:
        """Engines that no placement moves, if theirs is a model that one could wake: each on a GPU of its own."""
        ours = {s.report.spec.model for s in self._seats.values()}
        return [
            GpuState(gpu_id=f"{spec.engine_id} beside", usable_bytes=0, residents=[_fixed(spec.model)])
            for spec in fleet
            if spec.engine_id not in self._seats and spec.model in ours
        ]

    def _resident(self, seat: _Seat, drain_s: float, now_s: float, *, holds_parent: bool) -> Resident:
        e, use = seat.report, seat.use
        use.fade(now_s)
        asleep = seat.to == e.tier != "gpu"
        pinned = holds_parent or seat.restarting or self._is_off(seat, now_s)
        return Resident(
            model=e.spec.model,
            tier=e.tier,
            to=seat.to,
            hbm_bytes=e.hbm_bytes,
            ram_bytes=e.weight_bytes,
            kv_floor_bytes=e.kv_floor_bytes,
            kv_bytes=seat.kv_held_bytes,
            reserved_bytes=use.reserved_bytes,
            usual_bytes=use.usual_bytes,
            running=use.running,
            busy=0.0 if asleep else use.busy,
            used_at_s=use.used_at_s,
            changed_at_s=e.changed_at_s,
            drain_s=drain_s if use.running and drain_s > -math.inf else 0.0,
            holds_parent=seat.awake and (pinned or not e.leave_s.keys() & {"sleeping", "dropped"}),
            wake_s=0.0 if e.tier == "gpu" else _seconds(e.wake_s, e.tier),
            sleep_s=(_seconds(e.leave_s, "sleeping"), _seconds(e.wake_s, "sleeping")),
            drop_s=(_seconds(e.leave_s, _away(e)), _seconds(e.wake_s, _away(e))),
        )

    def _do(self, action: Action, now_s: float) -> None:
        seat = self._at.get((action.gpu_id, action.model))
        if seat is None:
            return
        if isinstance(action, Wake):
            self._bring(seat, now_s)
        elif isinstance(action, Sleep):
            if action.promised and (other := self._at.get((action.gpu_id, action.promised))) is not None:
                self._promise(other, now_s)
            if seat.takes:
                to = action.to if action.to in seat.report.leave_s else _away(seat.report)
                seat.want, seat.told, seat.since_s = to, False, now_s
                seat.kv_bytes = seat.report.kv_floor_bytes
                log.info("%s is to go to %s%s", seat.engine_id, to, f" for {action.promised}" * bool(action.promised))
        elif seat.to == "gpu":
            seat.kv_bytes = max(seat.report.kv_floor_bytes, action.kv_bytes)

    def _bring(self, seat: _Seat, now_s: float) -> None:
        if seat.in_hbm or not seat.rests:
            return
        if not self._fits(seat):
            self._promise(seat, now_s)
            return
        if not seat.promised:
            log.info("%s is to come from %s", seat.engine_id, seat.report.tier)
        seat.want, seat.since_s, seat.promised = "gpu", now_s, False
        seat.kv_now_bytes = seat.report.kv_floor_bytes
        seat.kv_bytes = self._free_bytes(seat.report.gpu_id) + seat.report.kv_floor_bytes

    def _promise(self, seat: _Seat, now_s: float) -> None:
        """Have a model come as soon as there is room; its node is told now and waits for that."""
        if not seat.promised and not seat.in_hbm:
            log.info("%s is to come from %s once there is room", seat.engine_id, seat.report.tier)
            seat.want, seat.since_s, seat.promised = "gpu", now_s, True
            seat.kv_bytes = seat.kv_now_bytes = 0

    def _fits(self, seat: _Seat) -> bool:
        return seat.report.hbm_bytes + seat.report.kv_floor_bytes <= self._free_bytes(seat.report.gpu_id)

    def _free_bytes(self, gpu_id: str) -> int:
        there = [s for s in self._seats.values() if s.report.gpu_id == gpu_id and s.in_hbm]
        usable = self._gpus[gpu_id].usable_bytes if gpu_id in self._gpus else 0
        return usable - sum(s.report.hbm_bytes + max(s.kv_held_bytes, s.kv_now_bytes * s.coming) for s in there)

    def _settle(self, gpu_id: str) -> None:
        """Bring KV memory to what it shall be, as far as it is not reserved, or not free yet."""
        here = [s for s in self._seats.values() if s.report.gpu_id == gpu_id]
        promised = [s for s in here if s.promised]
        for s in promised:
            if self._asked_at_s - s.since_s > PROMISE_S and not any(o.going for o in here):
                s.promised, s.want = False, s.report.tier
        free = self._free_bytes(gpu_id)
        for s in here:
            if s.kv_bytes and s.to == "gpu" and s.in_hbm:
                held = max(s.kv_held_bytes, s.kv_now_bytes * s.coming)
                least = max(s.kv_bytes, s.report.kv_floor_bytes, s.use.reserved_bytes)
                more = 0 if promised else max(0, min(s.kv_bytes - held, free))
                free -= more
                s.kv_now_bytes = min(held, least) + more

    def _rejuvenate(self, waiting: Waiting, now_s: float) -> None:
        """Have engines restarted whose memory grows without end: drained first, as for a sleep."""
        pending = [s.engine_id for s in self._seats.values() if s.restarting or s.coming]
        wait = Counter(t.model for t in waiting.tickets)
        for engine_id in rejuvenate(list(self._nodes.values()), waiting=wait, pending=pending, now_s=now_s):
            seat = self._seats[engine_id]
            if seat.takes and not self._is_off(seat, now_s):
                log.info("%s is to restart: %s", engine_id, seat.report.ageing)
                seat.restarts, seat.told, seat.since_s = seat.report.rejuvenation + 1, False, now_s

    # -- tell ----------------------------------------------------------------------------------------------------------
    async def tell(self, epoch: int) -> None:
        """Tell nodes what is wanted of them now. The fleet as it is (`takes`) has been published under this epoch."""
        closing = [s for s in self._seats.values() if not s.told]
        if closing:
            ledger = await self._queue.ledger()
            for seat in closing:
                seat.told = not ledger.slots.get(seat.engine_id)
        wishes: defaultdict[str, dict[str, Want]] = defaultdict(dict)
        for engine_id, seat in self._seats.items():
            if seat.want is not None:
                wishes[seat.node_id][engine_id] = _wish(seat)
        for node_id, known in list(self._told.items()):
            wanted = Wanted(epoch=epoch, engines=wishes[node_id])
            if wanted != known:
                if not await self._queue.want(node_id, wanted):
                    return
                self._told[node_id] = wanted


def _wish(seat: _Seat) -> Want:
    assert seat.want is not None
    if seat.told:
        return Want(tier=seat.want, kv_bytes=seat.kv_now_bytes * (seat.want == "gpu"), rejuvenation=seat.restarts)
    return Want(tier="gpu", kv_bytes=seat.kv_now_bytes, rejuvenation=seat.report.rejuvenation)


def _away(e: EngineReport) -> Tier:
    """Where its weights go that are not to stay in host memory of its server."""
    if "dropped" in e.leave_s:
        return "dropped"
    return "host" if "host" in e.leave_s else "disk"


def _seconds(table: Mapping[str, float], tier: Tier) -> float:
    return table.get(tier, math.inf)


def _fixed(model: str) -> Resident:
    return Resident(model=model, tier="gpu", to="gpu", hbm_bytes=0, ram_bytes=0, kv_floor_bytes=0, holds_parent=True)


class _Runs:
    """What runs are expected to call next: after the stages that run, and after those that ended until something came."""

    def __init__(self, demands: Demands, workflows: Workflows) -> None:
        self._demands = demands
        self._workflows = workflows
        #: Run -> its stages, and when each has ended.
        self._stages: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._running: set[str] = set()

    def _of(self, run_id: str) -> dict[str, float]:
        found = self._stages.setdefault(run_id, {})
        if len(self._stages) > MAX_RUNS:
            self._forget(next(iter(self._stages)))
        return found

    def begins(self, stage: Ticket | Observation) -> None:
        """A stage is new: it is what was expected after the one of its run that had ended last."""
        if not stage.run_id:
            return
        stages = self._of(stage.run_id)
        before = {s: at_s for s, at_s in stages.items() if at_s - TOUCH_S <= stage.pushed_at_s}
        if before:
            last = max(before, key=lambda s: before[s])
            self._demands.followed(last)
            del stages[last]
        stages[stage.stage_id] = math.inf

    def runs(self, ticket: Ticket, ends_at_s: float) -> None:
        """It runs, and will end then."""
        if ticket.run_id and ticket.stage_id not in self._running and ticket.stage_id in self._of(ticket.run_id):
            self._running.add(ticket.stage_id)
            self._demands.expect(ticket.stage_id, self._workflows.next_models(ticket), ends_at_s)

    def ended(self, o: Observation) -> None:
        if not o.run_id:
            return
        self._running.discard(o.stage_id)
        stages = self._of(o.run_id)
        if o.stage_id not in stages:
            self.begins(o)
        if o.status is Status.DONE:
            stages[o.stage_id] = o.finished_at_s
            self._demands.expect(o.stage_id, self._workflows.next_models(o), o.finished_at_s)
        else:
            stages.pop(o.stage_id, None)
            self._demands.followed(o.stage_id)

    def run_ended(self, run_id: str) -> None:
        self._forget(run_id)

    def _forget(self, run_id: str) -> None:
        for stage_id in self._stages.pop(run_id, {}):
            self._running.discard(stage_id)
            self._demands.followed(stage_id)
