"""Who wants which model, told to a placement as `placement.Demand`: stages that wait, the work that came lately, and the calls
that running runs are expected to make. The live scheduler and the simulator tell it what they see; it looks at no clock.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from maestro_agents.policy.placement import Demand
from maestro_agents.workflow import Next

ASK_S: Final = 0.25
"""Shortest time between two questions to the placement."""

MEMORY_S: Final = 60.0
"""Demand and use are learned over about so many seconds."""

RARE: Final = 0.02
"""Calls that are less likely are not expected."""

OVERDUE_S: Final = 5.0
"""A call that was expected and has not come counts for so long."""


@dataclass(slots=True)
class _Model:
    waiting: int = 0
    pushed_sum_s: float = 0.0
    #: Stage -> when it was pushed, in that order.
    pushed: dict[str, float] = field(default_factory=dict[str, float])
    #: When the runs of those that wait are lost; and of those that are.
    lost_at_s: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    late: dict[str, float] = field(default_factory=dict[str, float])
    late_sum_s: float = 0.0
    #: Stages that wait too, of which no more is known.
    beyond: int = 0
    stages_per_s: float = 0.0
    work: float = 0.0
    at_s: float = 0.0

    def fade(self, now_s: float) -> None:
        keep = math.exp((self.at_s - now_s) / MEMORY_S)
        self.stages_per_s *= keep
        self.work *= keep
        self.at_s = now_s
        while self.lost_at_s and self.lost_at_s[0][0] < now_s:
            _, stage_id = heapq.heappop(self.lost_at_s)
            if stage_id in self.pushed and stage_id not in self.late:
                self.late[stage_id] = self.pushed[stage_id]
                self.late_sum_s += self.pushed[stage_id]


class Demands:
    """The demand for every model. Moments that it is told do not go back (`comes`, `of`)."""

    def __init__(self) -> None:
        self._models: defaultdict[str, _Model] = defaultdict(_Model)
        #: What running runs are expected to call, by the stage after which: (model, when, how many).
        self._foreseen: dict[str, list[tuple[str, float, float]]] = {}

    def waits(self, stage_id: str, model: str, pushed_at_s: float, lost_at_s: float) -> None:
        """A stage waits for a model; from ``lost_at_s`` on its run cannot meet its deadline. In the order of their pushes."""
        d = self._models[model]
        d.waiting += 1
        d.pushed_sum_s += pushed_at_s
        d.pushed[stage_id] = pushed_at_s
        if lost_at_s < math.inf:
            heapq.heappush(d.lost_at_s, (lost_at_s, stage_id))

    def leaves(self, stage_id: str, model: str) -> None:
        """It waits no more."""
        d = self._models[model]
        d.waiting -= 1
        d.pushed_sum_s -= d.pushed.pop(stage_id)
        d.late_sum_s -= d.late.pop(stage_id, 0.0)

    def more_wait(self, model: str, n: int) -> None:
        """Beyond those that were told so many more wait for a model, about as long."""
        self._models[model].beyond = n

    def nobody_waits(self) -> None:
        """All that was told of waiting is forgotten: it is told anew."""
        for d in self._models.values():
            d.waiting = d.beyond = 0
            d.pushed_sum_s = d.late_sum_s = 0.0
            d.pushed, d.late, d.lost_at_s = {}, {}, []

    def comes(self, model: str, service_s: float, now_s: float) -> None:
        """A stage of so many predicted seconds was pushed, whether it waits or not."""
        d = self._models[model]
        d.fade(now_s)
        d.stages_per_s += 1.0 / MEMORY_S
        d.work += service_s / MEMORY_S

    def expect(self, stage_id: str, after: Iterable[Next], ends_at_s: float) -> None:
        """After this stage, which ends then, its run is expected to call these."""
        found = [(f.model, ends_at_s + f.gap_s, f.expected) for f in after if f.expected > RARE]
        if found:
            self._foreseen[stage_id] = found

    def followed(self, stage_id: str) -> None:
        """What was expected after this stage has come, or will not."""
        self._foreseen.pop(stage_id, None)

    @property
    def wanted(self) -> bool:
        """Somebody waits, or is expected."""
        return bool(self._foreseen) or any(d.waiting for d in self._models.values())

    def of(self, now_s: float, due_at_s: Callable[[str], float]) -> dict[str, Demand]:
        """By model. ``due_at_s``: the smallest moment among the waiting stages of a model."""
        foreseen: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for stage_id, each in list(self._foreseen.items()):
            soon = [(model, max(0.0, at_s - now_s), n) for model, at_s, n in each if at_s >= now_s - OVERDUE_S]
            for model, in_s, n in soon:
                foreseen[model].append((in_s, n))
            if not soon:
                del self._foreseen[stage_id]
        demands: dict[str, Demand] = {}
        for model in dict.fromkeys((*self._models, *foreseen)):
            d = self._models[model]
            d.fade(now_s)
            waited_s = d.waiting * now_s - d.pushed_sum_s if d.waiting else 0.0
            demands[model] = Demand(
                model=model,
                waiting=d.waiting + d.beyond,
                waited_s=waited_s + d.beyond * waited_s / d.waiting if d.beyond and d.waiting else waited_s,
                late=len(d.late),
                late_waited_s=len(d.late) * now_s - d.late_sum_s if d.late else 0.0,
                oldest_at_s=next(iter(d.pushed.values()), math.inf),
                due_at_s=due_at_s(model) if d.waiting else math.inf,
                stages_per_s=d.stages_per_s,
                work=d.work,
                foreseen=foreseen.get(model, ()),
            )
        return demands


@dataclass(slots=True)
class Use:
    """What runs on an engine, and how much it was used lately."""

    running: int = 0
    reserved_bytes: int = 0
    used_at_s: float = -math.inf
    #: Faded means until ``at_s``: share of time in which it served, bytes reserved.
    busy: float = 0.0
    usual_bytes: float = 0.0
    at_s: float = 0.0

    def fade(self, now_s: float) -> None:
        """Bring the means to now."""
        keep = math.exp((self.at_s - now_s) / MEMORY_S)
        self.busy = keep * self.busy + (1.0 - keep) * (self.running > 0)
        self.usual_bytes = keep * self.usual_bytes + (1.0 - keep) * self.reserved_bytes
        self.at_s = now_s

    def becomes(self, running: int, reserved_bytes: int, now_s: float) -> None:
        """What runs there from now on."""
        self.fade(now_s)
        self.used_at_s = now_s
        self.running, self.reserved_bytes = running, reserved_bytes
