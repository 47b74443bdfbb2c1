"""The nouns of Maestro and the lifecycle of a stage, as data.

Everything here is frozen, keyword-only and free of I/O. Units are in the names: ``_s`` seconds (a moment ``_at_s`` is
epoch seconds on the queue's clock), ``_bytes``, ``_tokens``. A wrong value cannot be built: the constructor says why.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from maestro_agents.errors import IllegalMove, WireError

WIRE_VERSION: Final = 1
"""Version of a ticket as it travels. A reader accepts its own version and the one before it."""

EXTEND_TOKENS: Final = 64
"""Output tokens by which a reservation grows when its stream has outgrown it: four blocks of vLLM's usual 16."""

DEFAULT_DEADLINE_S: Final[Mapping[str, float]] = {"interactive": 30.0, "batch": 600.0}
"""Deadline of a run whose caller named only a service class."""


class ServiceClass(enum.StrEnum):
    """Who is waiting for the answer."""

    #: A person waits.
    INTERACTIVE = "interactive"
    #: Nobody waits at a screen; throughput counts.
    BATCH = "batch"


class Mode(enum.StrEnum):
    """How much of a call is ours. `Switch` can only lower what a process's own setting allows."""

    #: Ordered and routed.
    ON = "on"
    #: Measured and recorded; it goes out as its caller made it, when its caller made it.
    OBSERVE = "observe"
    #: As if Maestro were not there.
    OFF = "off"

    @property
    def rank(self) -> int:
        """The larger, the more is ours."""
        return (Mode.OFF, Mode.OBSERVE, Mode.ON).index(self)


class Status(enum.StrEnum):
    """Where a stage is. The last five are terminal: one of them is written once and never changed."""

    #: Waiting in the ready set.
    QUEUED = "queued"
    #: Holds a lease on one engine.
    GRANTED = "granted"
    #: Answered.
    DONE = "done"
    #: Ended with an error that the caller saw.
    FAILED = "failed"
    #: Withdrawn by its caller.
    CANCELLED = "cancelled"
    #: Refused early: the deadline cannot be met and the caller asked to be told.
    REFUSED = "refused"
    #: Its app died.
    LOST = "lost"


class Command(enum.StrEnum):
    """What can be said about a stage. Each is one Lua file and one method of the queue."""

    PUSH = "push"
    GRANT = "grant"
    FINISH = "finish"
    FAIL = "fail"
    REQUEUE = "requeue"
    CANCEL = "cancel"
    REFUSE = "refuse"
    LOSE = "lose"


TRANSITIONS: Final[Mapping[tuple[Status | None, Command], frozenset[Status]]] = {
    (None, Command.PUSH): frozenset({Status.QUEUED, Status.GRANTED}),  # GRANTED: the fast path
    (Status.QUEUED, Command.GRANT): frozenset({Status.GRANTED}),
    (Status.QUEUED, Command.CANCEL): frozenset({Status.CANCELLED}),
    (Status.QUEUED, Command.REFUSE): frozenset({Status.REFUSED}),
    (Status.QUEUED, Command.LOSE): frozenset({Status.LOST}),
    (Status.GRANTED, Command.FINISH): frozenset({Status.DONE}),
    (Status.GRANTED, Command.FAIL): frozenset({Status.FAILED}),
    (Status.GRANTED, Command.REQUEUE): frozenset({Status.QUEUED}),
    (Status.GRANTED, Command.CANCEL): frozenset({Status.CANCELLED}),
    (Status.GRANTED, Command.LOSE): frozenset({Status.LOST}),
}
"""The whole lifecycle. A move that is not in the table changes nothing."""

TERMINAL: Final = frozenset({Status.DONE, Status.FAILED, Status.CANCELLED, Status.REFUSED, Status.LOST})


def move(status: Status | None, command: Command, to: Status | None = None) -> Status:
    """Return the status after ``command``; raise `IllegalMove` where the table has no such move."""
    allowed = TRANSITIONS.get((status, command), frozenset())
    if to is None and len(allowed) == 1:
        (to,) = allowed
    if to is None or to not in allowed:
        raise IllegalMove(f"a stage that is {status or 'unknown'} cannot {command.value} to {to or 'anything'}")
    return to


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """A stage in the queue: ids and numbers. Never the prompt, never the answer."""

    #: Unique for ever; one LLM call of one attempt chain.
    stage_id: str
    #: The client process that waits for it (its inbox receives the grant).
    client_id: str
    #: The model as the caller names it.
    model: str
    #: One execution of a workflow.
    run_id: str = ""
    #: Hash of the graph's structure, or "" for a call outside any graph.
    workflow: str = ""
    #: Node path inside the graph, ``a:b`` for a node of a subgraph.
    node: str = ""
    #: Agent name + node path, e.g. ``support:triage``.
    role: str = ""
    service_class: ServiceClass = ServiceClass.INTERACTIVE
    tenant: str = "default"
    #: Where its app is (``MAESTRO_SITE``): what the network to each cluster costs is measured from there. "" where nobody says.
    site: str = ""
    #: The run must have ended by then (epoch seconds); inf where nobody asked.
    deadline_at_s: float = math.inf
    #: When the run began: what ageing and fairness count from.
    run_started_at_s: float = 0.0
    pushed_at_s: float = 0.0
    #: The moment by which the stage is due: the queue's order, smaller first.
    due_at_s: float = 0.0
    #: Estimate of the prompt's length, made where the prompt is.
    prompt_tokens: int = 0
    #: The caller's own bound on the output, None where there is none. Of each choice, where it asks for several.
    max_tokens: int | None = None
    #: Answers to the one prompt (``n``): they share its KV memory, each has its own for what it writes.
    choices: int = 1
    #: Salted hashes of how the prompt begins (`predict.prefix.prompt_blocks`); "" where there are none.
    prefix: str = ""
    #: How often this node ran before in this run.
    visit: int = 0
    #: LangGraph superstep; stages of the same step run beside each other.
    step: int = 0
    #: Other tasks of this node that had begun in the same superstep: the width of a fan-out, as far as it was known.
    siblings: int = 0
    #: 1 on the first try of its node (LangGraph's RetryPolicy).
    node_attempt: int = 1
    #: The same call was made before, and its node runs once more (resumed after an interrupt, or retried): no progress.
    replayed: bool = False
    #: Its caller throws it away then (timeout of a node or a superstep); inf where there is no such limit.
    limit_at_s: float = math.inf
    #: Made while its parent's stream is open: admitted at once (else the two wait for each other for ever).
    nested: bool = False
    #: Only this engine will do (it holds the conversation's state, e.g. ``previous_response_id``); "" for any.
    pinned_engine: str = ""
    #: Engines that failed this stage.
    excluded_engines: tuple[str, ...] = ()
    #: 1 on the first try.
    attempt: int = 1
    #: Refuse early, rather than serve late, when the deadline cannot be met.
    refuse_late: bool = False
    #: Its answer is streamed and its tokens are counted as they pass: its KV reservation can grow meanwhile.
    streams: bool = False
    #: Numeric features for the predictor, computed by the client (`predict.features.FEATURES`).
    features: tuple[float, ...] = ()
    #: Words of the prompt as hashed numbers (`predict.features.sketch_ids`), "" where the app sends none.
    sketch: str = ""

    def __post_init__(self) -> None:
        if not self.stage_id or not self.model or not self.client_id:
            raise WireError("a ticket needs stage_id, client_id and model")
        if self.prompt_tokens < 0 or (self.max_tokens is not None and self.max_tokens < 0):
            raise WireError(f"stage {self.stage_id}: token counts cannot be negative")
        if self.choices < 1:
            raise WireError(f"stage {self.stage_id}: a call has at least one choice, not {self.choices}")
        if math.isnan(self.due_at_s) or math.isnan(self.deadline_at_s) or math.isnan(self.limit_at_s):
            raise WireError(f"stage {self.stage_id}: a moment cannot be NaN")

    @property
    def role_key(self) -> str:
        """What statistics are kept under: the same role on another model is another population."""
        return f"{self.model}|{self.role}"

    def evolve(self, **changes: Any) -> Ticket:
        return dataclasses.replace(self, **changes)

    def encode(self) -> str:
        """As JSON text; inverse of `decode`."""
        return _encode(self, _TICKET_DEFAULTS)

    @classmethod
    def decode(cls, text: str | bytes) -> Ticket:
        """Read a ticket of this version or the one before it; fields from a newer minor are ignored."""
        try:
            body = json.loads(text)
            version = int(body.pop("v"))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise WireError(f"not a ticket: {e}") from e
        if not WIRE_VERSION - 1 <= version <= WIRE_VERSION:
            raise WireError(
                f"ticket version {version} is not understood (this is {WIRE_VERSION}): upgrade the older side"
            )
        known: dict[str, Any] = {"stage_id": "", "client_id": "", "model": ""}  # empty ones are refused below
        known |= {k: v for k, v in body.items() if k in _TICKET_FIELDS}
        for name in ("excluded_engines", "features"):
            if name in known:
                known[name] = tuple(known[name])
        try:
            if "service_class" in known:
                known["service_class"] = ServiceClass(known["service_class"])
            return cls(**known)
        except (ValueError, TypeError) as e:
            raise WireError(f"not a ticket: {e}") from e


def _encode(value: Ticket | Observation | RunEnd, defaults: Mapping[str, Any]) -> str:
    """JSON of what differs from the defaults. Not `dataclasses.asdict`: its deep copy costs more than the rest of a push."""
    body: dict[str, Any] = {"v": WIRE_VERSION}
    for name, default in defaults.items():
        if (found := getattr(value, name)) != default:
            body[name] = found
    return json.dumps(body, separators=(",", ":"))


_TICKET_DEFAULTS: Final = {f.name: f.default for f in dataclasses.fields(Ticket)}
_TICKET_FIELDS: Final = frozenset(_TICKET_DEFAULTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """A lease: permission to call one engine, held by one client, expiring unless renewed."""

    stage_id: str
    engine_id: str
    #: Fencing token: grows with every grant of the pool; a stale holder's word changes nothing.
    token: int
    #: The leadership under which it was given.
    epoch: int
    #: KV reservation in bytes; it grows while the answer streams (`ports.Queue.extend`).
    kv_bytes: int
    #: Output tokens that the reservation covers, 0 while unknown.
    output_tokens: int = 0
    #: vLLM's polarity: lower goes first.
    priority: int = 0
    granted_at_s: float = 0.0
    lease_until_s: float = 0.0
    #: Given in the same round trip as the push, without the planner.
    fast: bool = False
    #: Why there: predicted seconds by part; they add up to the cost that won.
    because: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A stage that is not served, told early, with the moment from which trying again makes sense."""

    stage_id: str
    reason: str
    retry_after_s: float


Verdict = Grant | Refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What became of a stage: the label that the predictor learns from. Numbers and ids only."""

    stage_id: str
    run_id: str
    workflow: str
    role: str
    node: str
    model: str
    engine_id: str
    service_class: ServiceClass
    tenant: str
    status: Status
    site: str = ""
    visit: int = 0
    step: int = 0
    siblings: int = 0
    node_attempt: int = 1
    replayed: bool = False
    attempt: int = 1
    fast: bool = False
    priority: int = 0
    prompt_tokens: int = 0
    #: Of all choices together, reasoning included, as the engine counts them (``usage.completion_tokens``).
    output_tokens: int = 0
    #: Prompt tokens that the engine had in its prefix cache, 0 also where it does not say.
    cached_tokens: int = 0
    tool_calls: int = 0
    choices: int = 1
    prefix: str = ""
    run_started_at_s: float = 0.0
    deadline_at_s: float = math.inf
    pushed_at_s: float = 0.0
    granted_at_s: float = 0.0
    #: First byte of the answer reached the caller (0 where it never did).
    first_byte_at_s: float = 0.0
    finished_at_s: float = 0.0
    #: The engine's own account where it gives one (vLLM ``--enable-per-request-metrics``), else 0: seconds in its queue,
    #: then seconds from there to the first token.
    engine_queue_s: float = 0.0
    engine_ttft_s: float = 0.0
    #: The call went out as its caller made it: Maestro measured it and neither ordered nor routed it.
    observed: bool = False
    #: ``output_tokens`` counts the content events of a stream that named no usage, about one a token.
    output_estimated: bool = False
    #: KV bytes that were reserved at its end, and how often that had grown while the answer streamed. Of these steps,
    #: ``kv_overdrafts`` found no free KV memory on the engine, which may have had to preempt.
    kv_reserved_bytes: int = 0
    kv_extensions: int = 0
    kv_overdrafts: int = 0
    #: Of its engine, as the fleet says: what its tokens really took can be worked out and held against that.
    kv_bytes_per_token: int = 0
    features: tuple[float, ...] = ()
    sketch: str = ""

    @property
    def wait_s(self) -> float:
        """Seconds in Maestro's queue."""
        return max(0.0, self.granted_at_s - self.pushed_at_s)

    @property
    def choice_tokens(self) -> int:
        """Output tokens of one choice: what a `Prediction` is about, and what ``max_tokens`` bounds."""
        return math.ceil(self.output_tokens / max(1, self.choices))

    @property
    def service_s(self) -> float:
        """Seconds from the grant to the last byte."""
        return max(0.0, self.finished_at_s - self.granted_at_s)

    def encode(self) -> str:
        """As JSON text; inverse of `decode`."""
        return _encode(self, _OBSERVATION_DEFAULTS)

    @classmethod
    def decode(cls, text: str | bytes) -> Observation:
        try:
            body = json.loads(text)
            body.pop("v")
            known = {k: v for k, v in body.items() if k in _OBSERVATION_FIELDS}
            for name in ("stage_id", "run_id", "workflow", "role", "node", "model", "engine_id", "tenant"):
                known.setdefault(name, "")
            known["service_class"] = ServiceClass(known["service_class"])
            known["status"] = Status(known["status"])
            known["features"] = tuple(known.get("features", ()))
            return cls(**known)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise WireError(f"not an observation: {e}") from e


_OBSERVATION_DEFAULTS: Final = {f.name: f.default for f in dataclasses.fields(Observation)}
_OBSERVATION_FIELDS: Final = frozenset(_OBSERVATION_DEFAULTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnd:
    """A run is over (or paused): what the statistics of remaining work learn from."""

    run_id: str
    workflow: str
    #: ``done``, ``error``, ``cancelled``, ``paused``. Only ``done`` teaches.
    outcome: str
    started_at_s: float
    ended_at_s: float
    deadline_at_s: float = math.inf
    service_class: ServiceClass = ServiceClass.INTERACTIVE
    tenant: str = "default"
    #: Calls of it went out as their caller made them, measured only.
    observed: bool = False
    #: What was seen of its graph: tasks of each node; LLM calls of each node; (from, to, how many tasks of ``from`` led to
    #: a task of ``to``), ``__start__`` and ``__end__`` included. A task that had not ended well is not counted.
    tasks: Mapping[str, int] = field(default_factory=dict[str, int])
    calls: Mapping[str, int] = field(default_factory=dict[str, int])
    moves: tuple[tuple[str, str, int], ...] = ()

    @property
    def met_deadline(self) -> bool:
        return self.outcome == "done" and self.ended_at_s <= self.deadline_at_s

    def encode(self) -> str:
        """As JSON text; inverse of `decode`."""
        return _encode(self, _RUN_END_DEFAULTS)

    @classmethod
    def decode(cls, text: str | bytes) -> RunEnd:
        try:
            body = json.loads(text)
            known = {k: v for k, v in body.items() if k in _RUN_END_DEFAULTS}
            known["service_class"] = ServiceClass(known.get("service_class", "interactive"))
            known["moves"] = tuple((str(a), str(b), int(n)) for a, b, n in known.get("moves", ()))
            for name in ("tasks", "calls"):
                known[name] = {str(node): int(n) for node, n in dict(known.get(name, ())).items()}
            return cls(**known)
        except (ValueError, TypeError, AttributeError) as e:
            raise WireError(f"not the end of a run: {e}") from e


_RUN_END_DEFAULTS: Final[Mapping[str, Any]] = {
    **{f.name: f.default for f in dataclasses.fields(RunEnd)},
    "tasks": {},
    "calls": {},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Switch:
    """What an operator allows a whole pool (``maestro switch``): the key ``switch`` in Redis. None there is ``on``."""

    mode: Mode = Mode.ON
    #: Who set it, in one word, e.g. ``alice@host``.
    by: str = ""
    at_s: float = 0.0
    reason: str = ""

    def encode(self) -> str:
        """``off alice@host 1790000000.0 why``: to be read, and set, by hand in redis-cli too (``off`` alone will do)."""
        by = "-".join(self.by.split()) or "-"
        return f"{self.mode} {by} {self.at_s:.1f} {' '.join(self.reason.split())}".rstrip()

    @classmethod
    def decode(cls, text: str | None) -> Switch:
        """Raises `WireError` for a mode that is none; who, when and why may be missing."""
        mode, by, at, reason = (*(text or Mode.ON).split(maxsplit=3), "", "", "", "")[:4]
        try:
            return cls(mode=Mode(mode.strip('"').lower()), by=by.strip("-"), at_s=float(at or 0), reason=reason)
        except ValueError as e:
            raise WireError(f"the switch of this pool says {text!r}: use on, observe or off (`maestro switch`)") from e

    @property
    def at_rest(self) -> bool:
        """There is nothing to tell: it is on, and what the key said was understood."""
        return self.mode is Mode.ON and not (self.reason and not self.by)

    def told(self) -> str:
        """Who set it, when and why, as far as is known, for people."""
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.at_s)) if self.at_s else ""
        who = " ".join(part for part in (at and f"since {at}", self.by and f"by {self.by}") if part)
        return ": ".join(part for part in (who, self.reason) if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a stage will cost, and how we know. Output tokens are those of one choice, what a model reasons included."""

    output_tokens_mean: float
    output_tokens_p50: float
    output_tokens_p90: float
    output_tokens_p99: float
    #: Seconds of this stage on an unloaded engine.
    service_s: float
    #: Seconds of LLM work of the run after this stage, along its longest path.
    remaining_s: float
    #: What else the run does after it (`workflow.Remaining`): seconds of tools and code, LLM calls, output tokens; the
    #: chance that it makes no further call; seconds by which this stage could end later without delaying its run.
    remaining_tool_s: float = 0.0
    remaining_stages: float = 0.0
    remaining_tokens: float = 0.0
    ends_p: float = 0.0
    slack_s: float = 0.0
    #: What is known besides: seconds that earlier stages of the run were served; seconds by which its tenant is ahead of its
    #: fair share (`policy.fairness`).
    attained_s: float = 0.0
    debt_s: float = 0.0
    #: What it rests on: ``model VERSION``, ``median(n)`` (the model is worse here), ``role(n)``, ``prior``.
    basis: str = "prior"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """One vLLM server process serving one model, as the fleet file names it."""

    engine_id: str
    #: ``http://host:port/v1``.
    url: str
    model: str
    #: The name the server knows the model by, where it differs.
    served_model: str = ""
    #: Stages it runs at a time (vLLM ``--max-num-seqs``).
    slots: int = 8
    #: GPUs that it runs on (tensor parallelism): what its seconds are worth.
    gpus: int = 1
    #: KV memory in bytes; 0 while unknown (then slots alone admit).
    kv_bytes: int = 0
    #: KV bytes of one token in all layers, on one GPU of the engine (as ``kv_bytes`` is).
    kv_bytes_per_token: int = 1
    #: KV memory is given in blocks of so many tokens (vLLM ``--block-size``).
    kv_block_tokens: int = 1
    #: The part of ``kv_bytes_per_token`` in layers that see only the last ``kv_window_tokens`` tokens, and keep no more.
    kv_window_bytes_per_token: int = 0
    kv_window_tokens: int = 0
    #: Environment variable that holds its API key; the key itself never travels.
    api_key_env: str = ""
    #: What the proxy in front of it asks for (`tokens`), as the scheduler published it last; "" where there is none. For the
    #: ``Authorization`` of a call and nothing else: never shown, written to a file, or compared.
    token: str = field(default="", repr=False, compare=False)
    #: The same for an outage of Maestro (`in_outage`): it is good for longer, and for few calls a second.
    outage_token: str = field(default="", repr=False, compare=False)
    cluster: str = "local"
    #: Network seconds there and back, as the fleet file says; what was measured from a site is in `EngineState.rtts`.
    rtt_s: float = 0.0
    #: Tenants whose calls must not be served there (data residency, `tenants.Tenant.allow_clusters`).
    closed_to: tuple[str, ...] = ()
    #: How it is told what it should know of a call beside its text: one of `hints.DIALECTS`.
    hints: str = "vllm"
    #: The caller's own URL: never rewritten, no vLLM fields added.
    original: bool = False
    #: Longest prompt + output, 0 while unknown.
    max_model_len: int = 0
    #: Cold-start speeds, until completions teach better.
    prefill_s_per_token: float = 0.0005
    decode_s_per_token: float = 0.02

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise WireError(f"engine {self.engine_id}: slots must be at least 1")
        sizes = (self.kv_bytes, self.kv_bytes_per_token, self.kv_window_bytes_per_token, self.kv_window_tokens)
        if min(sizes) < 0:
            raise WireError(f"engine {self.engine_id}: KV sizes cannot be negative")
        if self.kv_block_tokens < 1:
            raise WireError(f"engine {self.engine_id}: a KV block has at least one token, not {self.kv_block_tokens}")
        if self.kv_window_bytes_per_token > self.kv_bytes_per_token:
            raise WireError(f"engine {self.engine_id}: kv_window_bytes_per_token is a part of kv_bytes_per_token")

    def kv_bytes_of(self, prompt_tokens: int, output_tokens: int, choices: int = 1) -> int:
        """KV bytes of a prompt and what each of its choices has written, in whole blocks.

        Choices share the prompt's full blocks. A layer with a window of w tokens keeps ``ceil((w - 1) / block) + 1`` blocks
        of each choice at most, since the window need not begin where a block does (vLLM's ``SlidingWindowSpec``).
        """
        size = self.kv_block_tokens
        shared = prompt_tokens // size
        blocks = shared + choices * -(-(prompt_tokens - shared * size + output_tokens) // size)
        held = blocks
        if self.kv_window_tokens:
            held = min(blocks, choices * (-(-(self.kv_window_tokens - 1) // size) + 1))
        return size * (blocks * self.kv_bytes_per_token - (blocks - held) * self.kv_window_bytes_per_token)

    def with_kv_tokens(self, tokens: int) -> EngineSpec:
        """The same engine with KV memory for ``tokens``, as vLLM counts them: as many requests of the greatest length
        as fit, times that length.
        """
        longest = self.max_model_len if self.kv_window_tokens else 0
        size = tokens * self.kv_bytes_of(longest, 0) // longest if longest else tokens * self.kv_bytes_per_token
        return dataclasses.replace(self, kv_bytes=size)

    def in_outage(self) -> EngineSpec:
        """The same engine, to be called without the scheduler's word."""
        return dataclasses.replace(self, token=self.outage_token) if self.token else self

    def encode(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> EngineSpec:
        names = {f.name for f in dataclasses.fields(cls)}
        known: dict[str, Any] = {k: v for k, v in body.items() if k in names}
        known["closed_to"] = tuple(known.get("closed_to", ()))
        return cls(**known)

    def serves(self, ticket: Ticket) -> bool:
        """It has the ticket's model, and its tenant's calls may be served there. Says nothing of health or room."""
        return self.model == ticket.model and ticket.tenant not in self.closed_to


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineState:
    """An engine as it is now: the spec, what is reserved, what was learned."""

    spec: EngineSpec
    reserved_slots: int = 0
    reserved_kv_bytes: int = 0
    healthy: bool = True
    #: From the engine's own metrics; -1 while unknown.
    running: int = -1
    waiting: int = -1
    #: Learned (`predict.speed`), 0 while unknown: of a prompt token, of an output token of a stage that runs alone, and what
    #: each stage beside it adds to that.
    prefill_s_per_token: float = 0.0
    decode_s_per_token: float = 0.0
    beside_s_per_token: float = 0.0
    #: Stages granted to it so far.
    grants: int = 0
    #: Site -> network seconds to its cluster and back, as measured there; inf: it cannot be reached from there.
    rtts: Mapping[str, float] = field(default_factory=dict[str, float])

    def rtt_s(self, site: str) -> float:
        """Network seconds there and back from a site: measured, or what the fleet file says."""
        return self.rtts.get(site, self.spec.rtt_s)

    @property
    def free_slots(self) -> int:
        return max(0, self.spec.slots - self.reserved_slots)

    @property
    def free_kv_bytes(self) -> float:
        return math.inf if self.spec.kv_bytes == 0 else max(0, self.spec.kv_bytes - self.reserved_kv_bytes)


def kv_need_bytes(ticket: Ticket, output_tokens: float, spec: EngineSpec) -> int:
    """KV reservation of a stage on an engine: prompt and ``output_tokens`` for each choice, in whole blocks.

    Paper (arXiv 2606.12950): ``KV = bytes/token x (L_in + L_out)``, with a quantile in place of its margin rho.
    """
    prompt = min(ticket.prompt_tokens, spec.max_model_len) if spec.max_model_len else ticket.prompt_tokens
    return spec.kv_bytes_of(prompt, _choice_tokens(ticket, output_tokens, spec), ticket.choices)


def covered_tokens(ticket: Ticket, output_tokens: float, spec: EngineSpec) -> int:
    """Output tokens, of all choices together, that a reservation of ``output_tokens`` for each is made for.

    No more than the caller allows, nor than the engine takes.
    """
    return ticket.choices * _choice_tokens(ticket, output_tokens, spec)


def _choice_tokens(ticket: Ticket, output_tokens: float, spec: EngineSpec) -> int:
    out = math.ceil(output_tokens if ticket.max_tokens is None else min(output_tokens, ticket.max_tokens))
    return min(out, max(0, spec.max_model_len - ticket.prompt_tokens)) if spec.max_model_len else out
