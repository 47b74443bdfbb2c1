"""What to do next: pure functions from a snapshot to a plan. No clock, no socket, no log; ``now_s`` is an argument.

The live scheduler and the simulator call `plan` alike. `priority` gives each stage its moment (`fairness`: between
tenants), `admission` says who may start (`quota`: of a tenant), `routing` where; `placement` which models are awake on which GPUs.
`baselines`: what ours is compared with.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from maestro_agents.core import EngineState, Grant, Prediction, Refusal, Ticket, covered_tokens
from maestro_agents.policy import admission, baselines, placement, priority, routing
from maestro_agents.policy.admission import Reserve
from maestro_agents.policy.placement import Place
from maestro_agents.policy.priority import Order
from maestro_agents.policy.quota import Left
from maestro_agents.policy.routing import Cost

__all__ = ["LIVE", "OURS", "POLICIES", "Knows", "Order", "Place", "Plan", "Policy", "Snapshot", "plan"]

DRIFT = 0.25
"""A stage keeps its moment while a new prediction would move it by less than this share of its distance from the push:
what is learned meanwhile does not shuffle those who wait, and does not cost a write for each of them."""

HOLD_AFTER_S = 5.0
"""A stage that waited this long for KV memory keeps smaller ones behind it from taking what becomes free."""


class Knows(enum.StrEnum):
    """What a policy is told of a stage and of the run behind it. Live it is always ``predicted``."""

    PREDICTED = "predicted"
    #: This stage alone: nothing of what may still follow it.
    STAGE = "stage"
    #: What all stages come to on average.
    NOTHING = "nothing"
    #: The truth, which only a simulation has.
    ALL = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How it is decided. Every part is a pure function, and a user's own may take its place."""

    order: Order = priority.ours
    cost: Cost = routing.cost
    reserve: Reserve = admission.reserved_output_tokens
    place: Place = placement.by_value
    knows: Knows = Knows.PREDICTED

    @property
    def chooses(self) -> bool:
        """It routes otherwise than ours, so that no stage may be placed without it: not even on the fast path."""
        return self.cost is not routing.cost


OURS: Final = Policy()

POLICIES: Final[Mapping[str, Policy]] = {
    "ours": OURS,
    "fcfs": Policy(order=baselines.fcfs),
    "fcfs-run": Policy(order=baselines.fcfs_run),
    "edf": Policy(order=baselines.edf),
    "edf-demote": Policy(order=baselines.demoted(baselines.edf)),
    "llf": Policy(order=baselines.llf),
    "plas": Policy(order=baselines.plas),
    "srtf": Policy(order=baselines.srtf),
    "maestro-paper": Policy(order=baselines.maestro_paper),
    "maestro-paper-demote": Policy(order=baselines.demoted(baselines.maestro_paper)),
    "qlm": Policy(order=baselines.qlm, place=placement.qlm),
    "lru": Policy(place=placement.lru),
    "no-colocation": Policy(place=placement.no_colocation),
    "static": Policy(place=placement.static),
    "boost": Policy(order=baselines.boost),
    "ours-no-deadline": Policy(order=priority.without_deadline),
    "ours-no-demotion": Policy(order=priority.on_time),
    "ours-cap": Policy(reserve=admission.cap),
    "ours-round-robin": Policy(cost=routing.round_robin),
    "ours-least-loaded": Policy(cost=routing.least_loaded),
    "ours-nearest": Policy(cost=routing.nearest),
    "ours-oracle": Policy(knows=Knows.ALL),
    "ours-no-prediction": Policy(knows=Knows.NOTHING),
    "ours-no-dag": Policy(knows=Knows.STAGE),
    "ours-no-prewake": Policy(place=placement.without_foresight),
}
"""The policies by name, for the command line."""

LIVE: Final[Mapping[str, Policy]] = {k: p for k, p in POLICIES.items() if p.knows is Knows.PREDICTED}
"""Those that a scheduler can run; the others can only be simulated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """All that a decision may look at."""

    tickets: Sequence[Ticket]
    predictions: Mapping[str, Prediction]
    engines: Sequence[EngineState]
    #: (stage id, engine id) -> prompt tokens that the engine is expected to have in its prefix cache.
    cached_tokens: Mapping[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    #: What of each limited tenant may still start.
    quotas: Mapping[str, Left] = field(default_factory=dict[str, Left])
    #: Every engine is there, dead ones too. The simulator shows those with room.
    complete: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What to do, in order."""

    grants: list[tuple[Ticket, Grant]] = field(default_factory=list[tuple[Ticket, Grant]])
    refusals: list[tuple[Ticket, Refusal]] = field(default_factory=list[tuple[Ticket, Refusal]])
    #: model -> stage id -> new moment.
    moments: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    #: Stages that wait for nothing but their tenant's quota: stage id -> the limit.
    over_quota: dict[str, str] = field(default_factory=dict[str, str])


def plan(snapshot: Snapshot, policy: Policy, *, epoch: int, now_s: float) -> Plan:
    """Order the waiting stages, then give each, in that order, the best engine that has room.

    What a tenant's quota holds back, others go past; stages of that tenant do not, so that a large one has its turn.

    Cost: O(tickets x log tickets + stages that find a free slot x engines of the model).
    """
    result = Plan()
    engines = {e.spec.engine_id: e for e in snapshot.engines}
    due: list[tuple[float, str, Ticket]] = []
    for ticket in snapshot.tickets:
        prediction = snapshot.predictions[ticket.stage_id]
        if ticket.refuse_late and priority.is_late(ticket, prediction, now_s):
            result.refusals.append((ticket, _too_late(ticket, snapshot)))
            continue
        moment = float("-inf") if ticket.nested else policy.order(ticket, prediction, now_s)
        if not ticket.nested and abs(moment - ticket.due_at_s) <= DRIFT * abs(moment - ticket.pushed_at_s):
            moment = ticket.due_at_s
        if moment != ticket.due_at_s:
            result.moments.setdefault(ticket.model, {})[ticket.stage_id] = moment
        due.append((moment, ticket.stage_id, ticket))
    held: set[str] = set()
    full: set[tuple[str, str, str]] = set()  # model, and what else decides which of its engines a stage may use
    quotas = dict(snapshot.quotas)
    stopped: dict[str, str] = {}  # tenant -> the limit that it is at
    for moment, _, ticket in sorted(due, key=lambda d: d[:2]):
        kind = (ticket.model, ticket.tenant, ticket.site)
        if kind in full and not ticket.nested:
            continue
        if ticket.tenant in stopped and not ticket.nested:
            result.over_quota[ticket.stage_id] = stopped[ticket.tenant]
            continue
        prediction = snapshot.predictions[ticket.stage_id]
        places = candidates(ticket, engines.values())
        if not places:
            if snapshot.complete and forbidden(ticket, engines.values()):
                refusal = Refusal(stage_id=ticket.stage_id, reason="residency", retry_after_s=0.0)
                result.refusals.append((ticket, refusal))
            continue
        tokens = policy.reserve(ticket, prediction)
        left = quotas.get(ticket.tenant)
        most_bytes = 0 if left is None or ticket.nested else left.tenant.max_kv_bytes
        needs = {e.spec.engine_id: admission.reservation_bytes(ticket, tokens, e, most_bytes) for e in places}
        if not any(admission.could_ever_fit(needs[e.spec.engine_id], e) for e in places):
            result.refusals.append(
                (ticket, Refusal(stage_id=ticket.stage_id, reason="no engine fits", retry_after_s=0.0))
            )
            continue
        if left is not None and not ticket.nested:
            least_bytes = min(needs.values())
            if left.forbids(kv_bytes=least_bytes, prompt_tokens=ticket.prompt_tokens):
                result.refusals.append(
                    (ticket, Refusal(stage_id=ticket.stage_id, reason="beyond quota", retry_after_s=0.0))
                )
                continue
            counted = max(ticket.prompt_tokens + covered_tokens(ticket, tokens, e.spec) for e in places)
            if limit := left.lacks(kv_bytes=least_bytes, tokens=counted):
                result.over_quota[ticket.stage_id] = stopped[ticket.tenant] = limit
                continue
            places = [e for e in places if needs[e.spec.engine_id] <= left.kv_bytes]
        room = [
            e
            for e in places
            if admission.fits(ticket, needs[e.spec.engine_id], e) and (e.spec.engine_id not in held or ticket.nested)
        ]
        if not room:
            if not any(e.free_slots for e in places):
                if not ticket.pinned_engine and not ticket.excluded_engines:
                    full.add(kind)
            elif now_s - ticket.pushed_at_s > HOLD_AFTER_S:
                held.update(e.spec.engine_id for e in places)
            continue
        cached = snapshot.cached_tokens
        costs = {
            e.spec.engine_id: policy.cost(ticket, prediction, e, cached.get((ticket.stage_id, e.spec.engine_id), 0))
            for e in room
        }
        best = min(room, key=lambda e: (routing.seconds(costs[e.spec.engine_id]), e.reserved_slots, e.spec.engine_id))
        place = best.spec.engine_id
        grant = Grant(
            stage_id=ticket.stage_id,
            engine_id=place,
            token=0,
            epoch=epoch,
            kv_bytes=needs[place],
            output_tokens=covered_tokens(ticket, tokens, best.spec),
            priority=wire_priority(moment),
            because=costs[place],
        )
        result.grants.append((ticket, grant))
        if left is not None:
            used = ticket.prompt_tokens + grant.output_tokens
            quotas[ticket.tenant] = left.after(kv_bytes=grant.kv_bytes, tokens=used)
        engines[place] = dataclasses.replace(
            best, reserved_slots=best.reserved_slots + 1, reserved_kv_bytes=best.reserved_kv_bytes + needs[place]
        )
    return result


def candidates(ticket: Ticket, engines: Iterable[EngineState]) -> list[EngineState]:
    """Engines that may serve a stage: its model, its tenant allowed, alive, reached from its site, pinned where its state lives, not where it just failed.

    Where every live engine has failed it, it may try them again. Where the one with its state is dead, so is the state:
    another engine will say that it does not know it, which is what the caller has to hear.
    """
    live = [e for e in engines if e.healthy and e.spec.serves(ticket) and math.isfinite(e.rtt_s(ticket.site))]
    pinned = [e for e in live if e.spec.engine_id == ticket.pinned_engine]
    if pinned:
        return pinned
    return [e for e in live if e.spec.engine_id not in ticket.excluded_engines] or live


def forbidden(ticket: Ticket, engines: Iterable[EngineState]) -> bool:
    """Engines have the stage's model, dead or alive, and none of them may serve its tenant: waiting would not help."""
    there = [e for e in engines if e.spec.model == ticket.model]
    return bool(there) and not any(e.spec.serves(ticket) for e in there)


def wire_priority(moment: float) -> int:
    """The moment as vLLM's integer priority (lower first), in milliseconds."""
    return 0 if moment in (float("-inf"), float("inf")) else int(moment * 1000.0)


def _too_late(ticket: Ticket, snapshot: Snapshot) -> Refusal:
    """Retry when the work that waits now has been served."""
    slots = sum(e.spec.slots for e in snapshot.engines if e.spec.model == ticket.model and e.healthy) or 1
    ahead = sum(snapshot.predictions[t.stage_id].service_s for t in snapshot.tickets if t.model == ticket.model)
    return Refusal(stage_id=ticket.stage_id, reason="deadline", retry_after_s=max(0.5, ahead / slots))
