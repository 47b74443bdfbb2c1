"""Whose run a call belongs to: what its caller says (`maestro_agents.hints`), or what the conversation shows.

A request whose messages begin with all those of an earlier request of the same tenant, and go on with an answer, is the next
call of that one's run. Of conversations only keyed hashes are remembered, a bounded number of them, here and nowhere else.

Names that callers give are theirs: runs, roles and workflows of one tenant never meet those of another, nor those of apps.
A run that nobody ends is told to be paused when it has been idle for `IDLE_S`: that teaches nothing about how long runs take.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import secrets
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from maestro_agents.client import Client
from maestro_agents.core import DEFAULT_DEADLINE_S, RunEnd, ServiceClass
from maestro_agents.hints import Said
from maestro_agents.predict.features import History
from maestro_agents.predict.prefix import conversation
from maestro_agents.predict.prompt import mapping

IDLE_S: Final = 300.0
"""A run without an end is over after so long without a call."""

PERSON_S: Final = 2.0
"""A conversation that goes on with words of its user, so long after its last answer, waited for a person: its deadline counts
from there. A program is faster."""

LONGEST_DEADLINE_S: Final = 7 * 24 * 3600.0
MAX_RUNS: Final = 20_000
MAX_BRANCHES: Final = 64
"""Conversations remembered of one run."""

SAME_BEGINNING: Final = 256
"""Runs remembered that a conversation of the same words may belong to."""

OUTCOMES: Final = ("done", "error", "cancelled")


@dataclass(eq=False, slots=True, kw_only=True)
class Run:
    """One execution of somebody's program, as far as its calls came here."""

    run_id: str
    tenant: str
    workflow: str
    service_class: ServiceClass
    deadline_s: float
    started_at_s: float
    deadline_at_s: float
    #: Its caller named it.
    named: bool
    calls: int = 0
    #: Role -> calls that it made.
    visits: Counter[str] = field(default_factory=Counter[str])
    #: Role of each call, in order, while each came after the one before had ended; None where some overlapped.
    order: list[str] | None = field(default_factory=list[str])
    history: History = field(default_factory=History)
    #: Hashes of the conversations by which its next call is known (`Runs`).
    sent: list[bytes] = field(default_factory=list[bytes])
    open_calls: int = 0
    observed: bool = False
    #: When its last answer ended: by the queue's clock, and by ours.
    last_at_s: float = 0.0
    touched_monotonic_s: float = field(default_factory=time.monotonic)
    #: What its caller said of its end, told once its open calls have ended.
    outcome: str = ""

    def visit(self, node: str) -> int:
        """Count one call of a role: how many it made before in this run."""
        before = self.visits[node]
        self.visits[node] += 1
        self.calls += 1
        if self.order is not None:
            self.order = None if self.open_calls or len(self.order) >= History.MOST else [*self.order, node]
        self.open_calls += 1
        self.touched_monotonic_s = time.monotonic()
        return before

    def restart_clock(self, now_s: float) -> None:
        """A person has spoken: start and deadline count from now."""
        self.started_at_s, self.deadline_at_s = now_s, now_s + self.deadline_s


class Runs:
    """The runs of this process's callers."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._runs: OrderedDict[str, Run] = OrderedDict()
        #: Hash of a whole conversation that was sent -> the runs that sent it, the oldest first.
        self._sent: dict[bytes, deque[Run]] = {}
        self._key = secrets.token_bytes(32)
        self._counter = itertools.count()
        self._prefix = secrets.token_hex(6)

    def __len__(self) -> int:
        return len(self._runs)

    def of(self, tenant: str, said: Said, body: Mapping[str, Any], *, after: Run | None = None) -> Run | None:
        """The run of a call, known or new; None for a call outside any. ``after``: the run whose answer it names."""
        now_s = self._client.now_s()
        name = said.run_id or said.session_id
        if name:
            run_id = f"{tenant}/{name}"
            run = self._runs.get(run_id)
            if run is None:
                run = self._begin(run_id, tenant, said, now_s, named=said.run_id is not None)
            else:
                run = self._go_on(run, body, now_s)
        elif after is not None:
            run = self._go_on(after, body, now_s)
        else:
            run = self._inferred(tenant, said, body, now_s)
        if run is not None:
            self._runs[run.run_id] = run
            self._runs.move_to_end(run.run_id)
            if len(self._runs) > MAX_RUNS:
                oldest = next((r for r in self._runs.values() if not r.open_calls), None)
                if oldest is not None:
                    self._end(oldest, "paused")
        return run

    def _begin(self, run_id: str, tenant: str, said: Said, now_s: float, *, named: bool) -> Run:
        service_class, deadline_s = self.terms(said)
        return Run(
            run_id=run_id,
            tenant=tenant,
            workflow=f"{tenant}/{said.workflow}" if said.workflow else "",
            service_class=service_class,
            deadline_s=deadline_s,
            started_at_s=now_s,
            deadline_at_s=now_s + deadline_s,
            named=named,
        )

    def terms(self, said: Said) -> tuple[ServiceClass, float]:
        """Service class and seconds to the deadline: what the caller says over what the settings say."""
        settings = self._client.settings
        service_class = said.service_class or settings.service_class
        default_s = settings.deadline_s if service_class is settings.service_class else None
        deadline_s = said.deadline_s or default_s or DEFAULT_DEADLINE_S[service_class]
        return service_class, min(deadline_s, LONGEST_DEADLINE_S)

    def _inferred(self, tenant: str, said: Said, body: Mapping[str, Any], now_s: float) -> Run | None:
        turns = conversation(body, hashlib.blake2b(tenant.encode(), key=self._key, digest_size=32).digest())
        if not turns:
            return None
        roles, hashes = [role for role, _ in turns], [digest for _, digest in turns]
        run = self._found(roles, hashes)
        if run is None:
            run_id = f"{tenant}/{self._prefix}-{next(self._counter)}"
            run = self._begin(run_id, tenant, said, now_s, named=False)
        else:
            run = self._go_on(run, body, now_s)
        same = self._sent.setdefault(hashes[-1], deque())
        if run not in same and len(run.sent) < MAX_BRANCHES and len(same) < SAME_BEGINNING:
            same.append(run)
            run.sent.append(hashes[-1])
        return run

    def _found(self, roles: list[str], hashes: list[bytes]) -> Run | None:
        """The run whose conversation this goes on with: the longest that was sent, whose next message is an answer."""
        for n in range(len(hashes) - 1, -1, -1):
            runs = self._sent.get(hashes[n])
            if runs is None:
                continue
            whole = n == len(hashes) - 1
            # the same words again: a retry within a conversation, or another conversation that begins alike
            if whole and not any(role in ("assistant", "") for role in roles):
                continue
            if not whole and roles[n + 1] not in ("assistant", ""):  # "": a call of a tool in the responses API
                continue
            run = runs[0] if whole else runs.popleft()
            if not runs:
                del self._sent[hashes[n]]
            return run
        return None

    def _go_on(self, run: Run, body: Mapping[str, Any], now_s: float) -> Run:
        if self._runs.get(run.run_id) is not run:  # told as paused: it goes on under its name
            self._runs[run.run_id] = run
        if not run.named and not run.open_calls and _a_person_speaks(body) and now_s - run.last_at_s > PERSON_S:
            run.restart_clock(now_s)
        return run

    # -- ends --------------------------------------------------------------------------------------------------------
    def ended(self, run: Run, *, node: str, visit: int, role: str, output_tokens: int, ok: bool) -> None:
        """A call of a run has ended, in whatever way."""
        run.open_calls -= 1
        run.last_at_s = self._client.now_s()
        run.touched_monotonic_s = time.monotonic()
        if run.run_id in self._runs:
            self._runs.move_to_end(run.run_id)
        if ok and output_tokens:
            run.history.ended(node=node, visit=visit, role=role, output_tokens=output_tokens)
        if run.outcome and not run.open_calls:
            self._end(run, run.outcome)

    def end_idle(self) -> None:
        """Tell of the runs that nobody has gone on with."""
        before_s = time.monotonic() - IDLE_S
        for run in tuple(self._idle(before_s)):
            self._end(run, "paused")

    def _idle(self, before_s: float) -> Iterator[Run]:
        for run in self._runs.values():
            if run.touched_monotonic_s > before_s:
                return
            if not run.open_calls:
                yield run

    def end_all(self) -> None:
        """The gateway stops."""
        for run in tuple(self._runs.values()):
            self._end(run, run.outcome or "paused")

    def _end(self, run: Run, outcome: str) -> None:
        self._runs.pop(run.run_id, None)
        for digest in run.sent:
            with contextlib.suppress(KeyError, ValueError):
                self._sent[digest].remove(run)
                if not self._sent[digest]:
                    del self._sent[digest]
        run.sent.clear()
        way = ["__start__", *run.order, "__end__"] if run.order and run.workflow and outcome == "done" else []
        tasks = dict(run.visits) if way else {}
        self._client.end_run(
            RunEnd(
                run_id=run.run_id,
                workflow=run.workflow,
                outcome=outcome,
                started_at_s=run.started_at_s,
                ended_at_s=run.last_at_s or self._client.now_s(),
                deadline_at_s=run.deadline_at_s if math.isfinite(run.deadline_at_s) else math.inf,
                service_class=run.service_class,
                tenant=run.tenant,
                observed=run.observed,
                tasks=tasks,
                calls=tasks,
                moves=tuple((a, b, n) for (a, b), n in Counter(itertools.pairwise(way)).items()),
            )
        )


def _a_person_speaks(body: Mapping[str, Any]) -> bool:
    said: object = body.get("messages", body.get("input"))
    turns = cast("list[object]", said) if isinstance(said, list) else []
    last = mapping(turns[-1] if turns else None)
    return isinstance(said, str) or last.get("role") == "user"
