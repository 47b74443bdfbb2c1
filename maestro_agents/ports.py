"""All that Maestro needs from outside, on one page. Each promise is written here; the contract suite holds every
implementation to it (``tests/queue_contract.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from maestro_agents.core import EngineSpec, Grant, Observation, Refusal, RunEnd, Status, Switch, Ticket, Verdict
from maestro_agents.nodes import NodeReport, Wanted
from maestro_agents.tenants import Tenant

MODELS_KEPT: Final = 3
MODEL_BYTES: Final = 16 * 2**20

USAGE_DAYS: Final = 400
"""Days for which what tenants used is kept."""

RETRY_FLOOR_S: Final = 0.5
"""The least that a refusal tells its caller to wait."""


class Clock(Protocol):
    """Where moments come from. Tests turn it by hand."""

    def now_s(self) -> float:
        """Epoch seconds. All clients of one queue agree to within the lease (Redis: the server's own clock)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Renewal:
    """What the heartbeat learns."""

    #: Stages of ours that the queue does not hold as ours any more.
    gone: tuple[str, ...]
    #: Stages that we believe to be waiting but that hold a grant: its message may be lost, `Queue.push` returns it.
    granted: tuple[str, ...]
    epoch: int
    #: A scheduler holds leadership.
    led: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservation:
    """KV bytes and a slot that a dead or cancelled stage may still occupy on its engine."""

    stage_id: str
    engine_id: str
    kv_bytes: int
    since_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A granted stage, as the queue knows it."""

    ticket: Ticket
    engine_id: str
    token: int
    kv_bytes: int
    granted_at_s: float
    lease_until_s: float
    #: Output tokens that were reserved for it when it was granted.
    output_tokens: int = 0
    #: Why there, as the grant said; empty on the fast path.
    because: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """Slots and KV bytes promised per engine, over live and draining stages."""

    slots: Mapping[str, int] = field(default_factory=dict[str, int])
    kv_bytes: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """The network between a site of apps (``MAESTRO_SITE``) and a cluster, as one of those apps measured it (`distance`)."""

    site: str
    cluster: str
    #: To there and back, smoothed; inf: it cannot be reached from there.
    rtt_s: float
    measured_at_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Backlog:
    """Seconds in which what waits now will have been served, as the leader predicts: what a refusal tells its caller to wait."""

    models: Mapping[str, float] = field(default_factory=dict[str, float])
    #: Of tenants that have a quota, as far as that lets them.
    tenants: Mapping[str, float] = field(default_factory=dict[str, float])


NO_BACKLOG: Final = Backlog()


class Queue(Protocol):
    """The pool's queue. `memory.MemoryQueue` is the specification; `redis.RedisQueue` keeps the same promises.

    Every command is atomic. A command that the lifecycle does not allow (`core.TRANSITIONS`) changes nothing and says
    so by its result.

    A grant is a stage id (random, 122 bits at least), a fencing token and the client that it was given to. What a client
    says of a stage counts only where all three are those of the grant (the stage id and the client, while it waits); to
    anybody else the queue answers as if it did not know the stage, and nothing changes.
    """

    #: Entries that the observation log keeps.
    log_length: int

    # -- the client's side -------------------------------------------------------------------------------------------
    async def push(self, ticket: Ticket, *, engines: Sequence[EngineSpec], now_s: float) -> Verdict | None:
        """Queue a ticket; or, on the fast path, grant it in the same round trip.

        The fast path is taken only when credits of the current epoch are valid at ``now_s``, no stage of the same model
        waits, and an engine of ``engines`` (allowed for this ticket) has a slot and the role's p99 KV bytes. A nested
        ticket ignores the ready set and the bounds: it is granted on the allowed engine with the most free slots. A tenant
        that is metered has no fast path, but for nested tickets: what it may start the scheduler alone knows.
        Pushing a known stage again changes nothing and returns its grant, if it has one, to the client that holds it. A
        full queue refuses (``full``), and so does a tenant's own bound on what of it may wait (``quota``: its
        ``max_waiting``, which nested tickets ignore); ``retry_after_s`` is the leader's `Backlog`, or `RETRY_FLOOR_S`.
        """
        ...

    async def verdicts(self, client_id: str, timeout_s: float) -> Sequence[Verdict]:
        """Wait for verdicts in the client's inbox, oldest first; empty after ``timeout_s``. Each is delivered once."""
        ...

    async def renew(self, client_id: str, stages: Mapping[str, int], *, now_s: float) -> Renewal:
        """Say that the client lives and still holds ``stages`` (stage id -> fencing token; 0 while it waits)."""
        ...

    async def announce(self, ticket: Ticket, grant: Grant | None, *, now_s: float) -> None:
        """Tell a queue that forgot what this client waits for or holds. Idempotent.

        It may have forgotten all (a Redis that lost its memory) or the last moment (a replica that took over): then it
        knows a stage as waiting whose grant this client has.
        """
        ...

    async def finish(self, observation: Observation, *, client_id: str, token: int, now_s: float) -> bool:
        """End a granted stage as DONE or FAILED, free its reservation, append the observation. False if not ours."""
        ...

    async def requeue(self, ticket: Ticket, *, token: int, now_s: float, draining: bool) -> bool:
        """Take a granted stage of ``ticket.client_id`` back to the ready set under the ticket's new moment (before its first
        byte). False if not ours.
        """
        ...

    async def cancel(
        self, stage_id: str, model: str, *, client_id: str | None, now_s: float, draining: bool
    ) -> Status | None:
        """Withdraw a stage. ``draining``: its request had left, so its reservation stays until `settle`.

        ``client_id``: None for an operator, whom every stage obeys. Returns the status it had before, None where the stage
        is unknown or another client's.
        """
        ...

    async def extend(self, stage_id: str, *, client_id: str, token: int, kv_bytes: int) -> bool | None:
        """Raise the reservation of a granted stage to ``kv_bytes`` in all, in its record and in the ledger.

        A total, so that it may be said twice; never less than before. What ends the stage frees all of it. None: not ours
        any more. False: raised too, but it is more than the engine published. Its answer cannot be held up, so vLLM may
        preempt; nothing is granted there until the ledger fits again.
        """
        ...

    async def end_run(self, run: RunEnd) -> None:
        """Append the end of a run to the observation log."""
        ...

    async def observe(self, observation: Observation) -> None:
        """Append a call that no stage of the queue stands for to the observation log."""
        ...

    async def switch(self) -> Switch:
        """What the operator allows this pool now. A word that is no mode is read as ``on``."""
        ...

    async def set_switch(self, switch: Switch, *, if_lost: bool = False) -> None:
        """Allow the pool this from now on. ``if_lost``: only where the queue knows of no switch at all."""
        ...

    async def describe(self, workflow: str, spec: str) -> None:
        """Keep the static graph of a workflow (JSON) under its fingerprint, once."""
        ...

    async def salt(self) -> bytes:
        """The pool's secret that hashes of prompts are keyed with, made when it is first asked for. Never logged."""
        ...

    async def fleet(self) -> Sequence[EngineSpec]:
        """The engines that the scheduler last published."""
        ...

    async def tenants(self) -> Sequence[Tenant]:
        """The tenants that the scheduler last published."""
        ...

    async def tell_distances(self, distances: Sequence[Distance]) -> None:
        """Keep what was measured, in place of what was known of the same site and cluster."""
        ...

    async def distances(self) -> Sequence[Distance]:
        """What was measured last from each site to each cluster. How old is too old is the reader's business."""
        ...

    # -- the scheduler's side ----------------------------------------------------------------------------------------
    async def lead(self, holder: str, *, ttl_s: float, now_s: float, at_least: int = 0) -> int | None:
        """Take or keep leadership. Returns the epoch: it grows whenever the holder changes and is never below
        ``at_least`` (how a leader raises it after the store restarted; tokens that follow are larger than any that a
        store which lost its last moment may have forgotten). None: another leads.
        """
        ...

    async def wake(self, timeout_s: float) -> None:
        """Return when something was pushed or freed since the last call, or after ``timeout_s``."""
        ...

    async def publish(
        self,
        engines: Sequence[EngineSpec],
        *,
        p99: Mapping[str, float],
        epoch: int,
        valid_until_s: float,
        tenants: Sequence[Tenant] = (),
        backlog: Backlog = NO_BACKLOG,
    ) -> bool:
        """Publish the fleet, its credits, its tenants, how long refused ones shall wait, and each role's p99 output tokens.
        False: a newer epoch rules, and nothing has changed.
        """
        ...

    async def heads(self, model: str, n: int, *, at_most: Mapping[str, int] | None = None) -> Sequence[Ticket]:
        """The first ``n`` waiting stages of a model, by moment.

        ``at_most``: no more than so many of each of these tenants, which do not count towards ``n``: however many of theirs are
        held back, the others are seen. Nested stages are nobody's here.
        """
        ...

    async def waiting(self, tenants: Collection[str]) -> Mapping[str, int]:
        """How many stages of each of these tenants wait, nested ones left out."""
        ...

    async def reorder(self, moments: Mapping[str, float], model: str) -> None:
        """Write new moments for waiting stages; those that no longer wait are left alone."""
        ...

    async def grant(self, grant: Grant, ticket: Ticket, *, now_s: float) -> Grant | None:
        """Give a waiting stage its lease (the token is drawn here) and tell its client. None: it no longer waits, its
        client is dead, the engine's credits are spent, or a newer epoch rules.
        """
        ...

    async def described(self, workflow: str) -> str | None:
        """The static graph that a client described under this fingerprint, None where none did."""
        ...

    async def refuse(self, refusal: Refusal, ticket: Ticket, *, now_s: float) -> bool:
        """End a waiting stage as REFUSED and tell its client."""
        ...

    async def reap(self, *, now_s: float) -> Sequence[str]:
        """End stages whose lease or whose client expired as LOST; their reservations begin to drain."""
        ...

    async def draining(self) -> Sequence[Reservation]:
        """Reservations whose stage has ended but whose engine may still be computing."""
        ...

    async def settle(self, reservation: Reservation) -> bool:
        """Give a draining reservation back: the engine agrees that it is idle again. False: it was settled before."""
        ...

    async def running(self) -> Sequence[Running]:
        """All granted stages."""
        ...

    async def ledger(self) -> Ledger:
        """What is reserved now."""
        ...

    async def depth(self, model: str) -> int:
        """How many stages wait for a model."""
        ...

    async def read_log(self, after: str, n: int) -> tuple[str, Sequence[Observation | RunEnd]]:
        """Up to ``n`` entries of the observation log after a position ("" for the beginning), and the new position."""
        ...

    async def charge(self, days: Mapping[str, Mapping[str, int]], *, after: str, to: str, epoch: int) -> bool:
        """Add to the counters of days (``YYYY-MM-DD``) what the observation log says between two positions, and keep ``to``.

        All or nothing, and each part of the log once: False, and nothing has changed, where ``after`` is not `charged_to`, or a
        newer epoch rules. Counters live for `USAGE_DAYS`.
        """
        ...

    async def charged_to(self) -> str:
        """The position of the observation log up to which usage was counted; "" where none was."""
        ...

    async def usage(self, day: str) -> Mapping[str, int]:
        """The counters of a day (`maestro_agents.chargeback` names them); empty where there are none."""
        ...

    async def publish_model(self, version: str, *, card: str, data: bytes | None, epoch: int | None) -> bool:
        """Make a trained model the pool's, and keep the `MODELS_KEPT` that were so last.

        ``version``: without white space. ``card``: JSON. ``data``: its file, at most `MODEL_BYTES` (else ValueError); empty
        where statistics alone shall predict; None for a version that is kept: it rules again, with the card it has.
        ``epoch``: None for an operator. False: a newer epoch rules, or no such version is kept.
        """
        ...

    async def model(self, known: str) -> tuple[str, bytes] | None:
        """The pool's model, version and file. None: there is none, or ``known`` is its version."""
        ...

    async def models(self) -> Mapping[str, str]:
        """Cards (JSON) of the models that are kept, by version, the one that rules first."""
        ...

    async def set_predictor_status(self, status: str) -> None:
        """Keep what the leader's predictor tells of itself (JSON), for people."""
        ...

    async def predictor_status(self) -> str:
        """What `set_predictor_status` was last told, "" where nothing was."""
        ...

    # -- the nodes' side (`maestro_agents.nodes`) ----------------------------------------------------------------------
    async def report(self, report: NodeReport, *, now_s: float, ttl_s: float) -> None:
        """Keep a node's account of itself, in place of its last one, for so many seconds; the scheduler wakes for it."""
        ...

    async def reports(self, now_s: float) -> Sequence[NodeReport]:
        """The accounts that have not expired, by node."""
        ...

    async def want(self, node_id: str, wanted: Wanted) -> bool:
        """Write what is wanted of a node, whole, under ``wanted.epoch``. False, and nothing has changed: a newer epoch rules."""
        ...

    async def wanted(self, node_id: str, *, known: str, timeout_s: float) -> tuple[str, Wanted] | None:
        """What is wanted of a node, and its version, as soon as that is not ``known`` ("": any); None after ``timeout_s`` (0: at once).

        It outlives the scheduler. Of the same wishes in a new epoch the version is a new one.
        """
        ...

    # -- the gateways' side ------------------------------------------------------------------------------------------
    async def add_api_key(self, digest: str, about: str) -> None:
        """Let a key of gateways count from now on. ``digest``: what is kept of it; ``about``: whose it is, JSON."""
        ...

    async def api_keys(self) -> Mapping[str, str]:
        """What is kept of the keys that count, by digest."""
        ...

    async def remove_api_key(self, digest: str) -> bool:
        """Let a key count no more. False: there was none."""
        ...

    async def incarnation(self) -> str:
        """Changes when the store restarted, and with it what it may have forgotten."""
        ...

    async def close(self) -> None:
        """Release connections. Idempotent."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineHealth:
    """What an engine says of itself."""

    healthy: bool
    running: int = -1
    waiting: int = -1
    #: KV memory in tokens, and tokens in a block of it; 0 where it does not say.
    kv_tokens: int = 0
    kv_block_tokens: int = 0


class EngineProbe(Protocol):
    """Reads an engine's own account. vLLM: ``GET /health`` and ``GET /metrics``."""

    async def probe(self, spec: EngineSpec) -> EngineHealth:
        """Never raises: an engine that does not answer is unhealthy."""
        ...

    async def close(self) -> None: ...
