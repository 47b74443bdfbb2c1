"""What a run still writes after each of its calls: known once the run has ended, and then an example to learn from.

The calls of runs that go on are remembered until their ends come (`RunEnd`), in numbers, with a bound. What a second `LengthModel`
then learns (`examples`: its target is what its run still wrote, its "short" answer that no call followed) corrects what
`Workflows` know of a role and visit (`roles.corrected`). The live scheduler (`live.Learner`) and the simulator's cross-fitted
predictions (`simulator.foresight`) count by the same function.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from maestro_agents.core import Observation, RunEnd, Status, Ticket
from maestro_agents.predict.trainer import Row
from maestro_agents.workflow import MAX_STAGES, Workflows, following

MAX_OPEN_CALLS: Final = 20_000
"""Calls of runs that go on, some 2 KB each; then the runs that began first are forgotten."""


class Ended(Protocol):
    """A call that ended: when, and what it wrote. Moments in seconds, of one clock."""

    @property
    def pushed_at_s(self) -> float: ...
    @property
    def finished_at_s(self) -> float: ...
    @property
    def output_tokens(self) -> int: ...


def rest_of(log: Sequence[Ended]) -> list[tuple[int, int]]:
    """Calls and output tokens of a run that begin once each of its calls has ended: what `Workflows` count, too. O(n log n)."""
    order = sorted(range(len(log)), key=lambda i: log[i].pushed_at_s)
    written = [0]
    for i in reversed(order):
        written.append(written[-1] + log[i].output_tokens)
    rests = [(0, 0)] * len(log)
    spans = [(log[i].pushed_at_s, log[i].finished_at_s) for i in order]
    for i, later in zip(order, following(spans), strict=True):
        rests[i] = later, written[later]
    return rests


class _Call(NamedTuple):
    """A call of a run that goes on: an `Ended`, and what is asked of it at the end."""

    #: Without features where they are of no use.
    row: Row
    workflow: str
    node: str
    tenant: str
    pushed_at_s: float
    finished_at_s: float
    output_tokens: int


class Told(NamedTuple):
    """What a run that ended says of one of its calls."""

    #: The call, as if it had written what its run still wrote, and had ended when the run did: then that was known.
    row: Row
    #: Tokens that `Workflows` would have said.
    known_tokens: float


class OpenRuns:
    """The calls of the runs that go on."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, list[_Call]] = OrderedDict()
        self._n = 0

    def __len__(self) -> int:
        """How many calls are remembered."""
        return self._n

    def add(self, o: Observation, row: Row | None) -> None:
        """Take a stage that ended. ``row``: as it is trained on, None without usable features."""
        pushed_at_s = o.pushed_at_s or o.granted_at_s
        if o.status is not Status.DONE or o.replayed or not o.run_id:
            return
        if not 0 <= pushed_at_s <= o.finished_at_s < math.inf:
            return
        calls = self._runs.setdefault(o.run_id, [])
        if len(calls) >= MAX_STAGES:
            return
        row = row or Row(o.model, o.role, o.visit, "", 0, False, o.run_id, 0.0, b"")
        output_tokens = max(0, o.output_tokens)
        calls.append(_Call(row, o.workflow, o.node, o.tenant, pushed_at_s, o.finished_at_s, output_tokens))
        self._n += 1
        while self._n > MAX_OPEN_CALLS:
            self._n -= len(self._runs.popitem(last=False)[1])

    def end(self, run: RunEnd, workflows: Workflows) -> list[Told]:
        """What a run's end tells of its calls; nothing where it did not end well, or is paused and goes on.

        ``workflows`` must not have learned from this run yet.
        """
        if run.outcome == "paused":
            return []
        calls = self._runs.pop(run.run_id, [])
        self._n -= len(calls)
        if run.outcome != "done" or not calls:
            return []
        ended_at_s = max(c.finished_at_s for c in calls)
        if math.isfinite(run.ended_at_s):
            ended_at_s = max(ended_at_s, run.ended_at_s)
        return [
            Told(c.row._replace(output_tokens=tokens, short=not n, ended_at_s=ended_at_s), _known(c, run, workflows))
            for c, (n, tokens) in zip(calls, rest_of(calls), strict=True)
        ]


def _known(call: _Call, run: RunEnd, workflows: Workflows) -> float:
    asked = Ticket(
        stage_id="-",
        client_id="-",
        run_id=run.run_id,
        model=call.row.model,
        workflow=call.workflow,
        role=call.row.role,
        node=call.node,
        visit=call.row.visit,
        tenant=call.tenant,
    )
    return workflows.remaining(asked).output_tokens
