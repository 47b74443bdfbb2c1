"""One vLLM engine with continuous batching, as a model: no I/O, no clock; every call says what time it is.

The rules, in the order in which a step applies them:

1. A step has a budget of tokens. Running requests come first: one token each where they decode, a chunk of what is
   left of their prompt where they prefill.
2. A running request that finds no free KV block preempts the lowest-priority running one (the youngest among equals),
   itself if need be. The victim loses its KV and waits again; it will recompute prompt and answer so far.
3. Where nobody was preempted, waiting requests are admitted in order, as long as a place in the batch, budget, and KV
   blocks for all their tokens so far are free. Order: (priority, arrival, id), lower first; under FCFS by submission.
4. The step takes ``base_s + prefill tokens x prefill_s_per_token + decoding requests x decode_s_per_seq``. At its end
   every request whose tokens are all computed has one token more.

A high-priority arrival never displaces a running request while KV blocks suffice: so does vLLM.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


class Scheduling(enum.StrEnum):
    """The order of the waiting queue (vLLM ``--scheduling-policy``)."""

    FCFS = "fcfs"
    PRIORITY = "priority"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineProfile:
    """How fast an engine is and how much fits. The defaults are round numbers of no GPU in particular."""

    #: Seconds that every step takes, whatever it does.
    base_s: float = 0.008
    prefill_s_per_token: float = 0.0001
    #: Seconds that each decoding request adds to a step.
    decode_s_per_seq: float = 0.0002
    #: Requests in a batch (vLLM ``--max-num-seqs``).
    max_num_seqs: int = 64
    #: Tokens in a step (vLLM ``--max-num-batched-tokens``).
    step_tokens: int = 2048
    #: Tokens in a KV block.
    block_size: int = 16
    num_blocks: int = 8192
    #: Longest prompt + output.
    max_model_len: int = 16_384
    scheduling: Scheduling = Scheduling.PRIORITY
    #: Requests waiting and running above which new ones are rejected (vLLM ``--max-num-queued-reqs``).
    max_queued: int | None = None

    def __post_init__(self) -> None:
        if min(self.base_s, self.prefill_s_per_token, self.decode_s_per_seq) < 0 or self.base_s == 0:
            raise ValueError("an engine profile: base_s must be positive, other durations must not be negative")
        if min(self.max_num_seqs, self.step_tokens, self.block_size, self.num_blocks, self.max_model_len) < 1:
            raise ValueError("an engine profile: sizes must be at least 1")
        if self.step_tokens < self.max_num_seqs:
            raise ValueError("an engine profile: step_tokens must be at least max_num_seqs, else some never decode")
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"an engine profile: {self.num_blocks} KV blocks of {self.block_size} tokens do not hold one request of "
                f"max_model_len={self.max_model_len}"
            )

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def faster(self, speed: float) -> EngineProfile:
        """The same engine with every duration divided by ``speed``."""
        if not 0 < speed < math.inf:
            raise ValueError(f"speed must be positive, got {speed}")
        return dataclasses.replace(
            self,
            base_s=self.base_s / speed,
            prefill_s_per_token=self.prefill_s_per_token / speed,
            decode_s_per_seq=self.decode_s_per_seq / speed,
        )


CPU_TINY: Final = EngineProfile(
    base_s=0.0035,
    prefill_s_per_token=0.0005,
    decode_s_per_seq=0.0014,
    max_num_seqs=16,
    block_size=128,
    num_blocks=2048,
    max_model_len=2048,
)
"""Resembles vLLM 0.32.0 with a 3.7 M parameter Llama on two AVX2 cores: 204/439/617 tokens/s at 1/4/16 streams
(measured 207/410/614), prefill 2,000 tokens/s."""

PROFILES: Final[Mapping[str, EngineProfile]] = {"cpu-tiny": CPU_TINY, "gpu": EngineProfile()}
"""By the name that a fleet file or a command line uses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """What a request costs. What it says is no concern of the engine."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    #: Lower goes first.
    priority: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(f"request {self.request_id}: prompt and output have at least one token each")


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """The end of a request, with its moments; ``inf`` for what never happened."""

    request: EngineRequest
    arrived_at_s: float
    ended_at_s: float
    started_at_s: float = math.inf
    first_token_at_s: float = math.inf
    output_tokens: int = 0
    preemptions: int = 0
    aborted: bool = False

    @property
    def queue_s(self) -> float:
        """Seconds before its first step."""
        return self.started_at_s - self.arrived_at_s

    @property
    def ttft_s(self) -> float:
        """Seconds to its first token."""
        return self.first_token_at_s - self.arrived_at_s

    @property
    def generation_s(self) -> float:
        """Seconds from its first token to its last."""
        return self.ended_at_s - self.first_token_at_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What happened since the last `Engine.step`."""

    #: New tokens by request.
    tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    #: Requests that ended, in order.
    ended: tuple[RequestRecord, ...] = ()


@dataclass(kw_only=True, slots=True, eq=False)
class _Live:
    """A request that waits or runs."""

    request: EngineRequest
    arrived_at_s: float
    #: Its place among the waiting.
    key: tuple[float | int | str, ...]
    computed: int = 0
    emitted: int = 0
    blocks: int = 0
    started_at_s: float = math.inf
    first_token_at_s: float = math.inf
    preemptions: int = 0

    @property
    def known(self) -> int:
        """Tokens whose KV must exist before the next token can come."""
        return self.request.prompt_tokens + self.emitted


class Engine:
    """The model. Time only moves forward: a ``now_s`` before the last one counts as the last one.

    Calls between two `step`s may come at any moments; a late `step` gives what the punctual ones would have given.
    """

    def __init__(self, profile: EngineProfile) -> None:
        self.profile = profile
        self.preemptions = 0
        self.free_blocks = profile.num_blocks
        self._now_s = -math.inf
        self._submitted = 0
        self._live: dict[str, _Live] = {}
        self._running: list[_Live] = []
        self._waiting: list[tuple[tuple[float | int | str, ...], _Live]] = []
        #: The step in progress: who gets how many tokens computed, and when it ends.
        self._scheduled: list[tuple[_Live, int]] = []
        self._ends_at_s = math.inf
        self._tokens: dict[str, int] = {}
        self._ended: list[RequestRecord] = []

    # -- what can be seen --------------------------------------------------------------------------------------------
    @property
    def wake_at_s(self) -> float:
        """When the next `step` has something to tell; ``inf`` while idle."""
        return self._ends_at_s

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks in use, 0..1."""
        return 1 - self.free_blocks / self.profile.num_blocks

    # -- what can be said --------------------------------------------------------------------------------------------
    def submit(self, request: EngineRequest, now_s: float) -> bool:
        """Queue a request. False: the queue is full. Raises ValueError for a known id or one that could never fit."""
        if request.request_id in self._live:
            raise ValueError(f"request {request.request_id} is already here")
        total = request.prompt_tokens + request.output_tokens
        if total > self.profile.max_model_len:
            raise ValueError(
                f"request {request.request_id}: {total} tokens, max_model_len={self.profile.max_model_len}"
            )
        self._advance(now_s)
        if self.profile.max_queued is not None and len(self._live) >= self.profile.max_queued:
            return False
        self._submitted += 1
        by_priority = self.profile.scheduling is Scheduling.PRIORITY
        key = (request.priority, self._now_s, request.request_id) if by_priority else (self._submitted,)
        live = _Live(request=request, arrived_at_s=self._now_s, key=key)
        self._live[request.request_id] = live
        self._wait(live)
        if not self._scheduled:
            self._begin_step()
        return True

    def abort(self, request_id: str, now_s: float) -> bool:
        """End a request at once, its KV blocks free; what the step in progress computes for it is lost. False: unknown."""
        self._advance(now_s)
        live = self._live.get(request_id)
        if live is None:
            return False
        if live in self._running:
            self._running.remove(live)
            self._free(live)
        else:
            self._waiting.remove((live.key, live))
            heapq.heapify(self._waiting)
        self._end(live, self._now_s, aborted=True)
        return True

    def step(self, now_s: float) -> Progress:
        """Let time pass until ``now_s`` and tell what happened since the last call."""
        self._advance(now_s)
        progress = Progress(tokens=self._tokens, ended=tuple(self._ended))
        self._tokens, self._ended = {}, []
        return progress

    # -- inside ------------------------------------------------------------------------------------------------------
    def _advance(self, now_s: float) -> None:
        while self._scheduled and self._ends_at_s <= now_s:
            self._now_s = self._ends_at_s
            self._end_step()
            self._begin_step()
        self._now_s = max(self._now_s, now_s)

    def _begin_step(self) -> None:
        """Decide the next batch at ``_now_s``."""
        budget = self.profile.step_tokens
        plan: dict[str, tuple[_Live, int]] = {}
        preempted = False
        for live in list(self._running):
            if live not in self._running or budget == 0:
                continue
            n = min(live.known - live.computed, budget)
            while not self._grow(live, live.computed + n):
                victim = self._victim()
                self._preempt(victim)
                preempted = True
                budget += plan.pop(victim.request.request_id, (victim, 0))[1]
                if victim is live:
                    break
            else:
                plan[live.request.request_id] = (live, n)
                budget -= n
        while not preempted and self._waiting and budget > 0 and len(self._running) < self.profile.max_num_seqs:
            live = self._waiting[0][1]
            if self._blocks(live.known) > self.free_blocks:
                break
            heapq.heappop(self._waiting)
            self._running.append(live)
            live.started_at_s = min(live.started_at_s, self._now_s)
            n = min(live.known, budget)
            self._grow(live, n)
            plan[live.request.request_id] = (live, n)
            budget -= n
        self._scheduled = list(plan.values())
        if not self._scheduled:
            self._ends_at_s = math.inf
            return
        decoding = sum(1 for live, n in self._scheduled if n == 1 and live.emitted)
        prefill = sum(n for _, n in self._scheduled) - decoding
        p = self.profile
        self._ends_at_s = self._now_s + p.base_s + prefill * p.prefill_s_per_token + decoding * p.decode_s_per_seq

    def _end_step(self) -> None:
        """The step in progress is over at ``_now_s``."""
        for live, n in self._scheduled:
            request = live.request
            if self._live.get(request.request_id) is not live:
                continue  # aborted meanwhile
            live.computed += n
            if live.computed < live.known:
                continue  # more of its prompt is to come
            live.first_token_at_s = min(live.first_token_at_s, self._now_s)
            live.emitted += 1
            self._tokens[request.request_id] = self._tokens.get(request.request_id, 0) + 1
            if live.emitted == request.output_tokens:
                self._running.remove(live)
                self._free(live)
                self._end(live, self._now_s)
        self._scheduled = []

    def _end(self, live: _Live, at_s: float, *, aborted: bool = False) -> None:
        del self._live[live.request.request_id]
        self._ended.append(
            RequestRecord(
                request=live.request,
                arrived_at_s=live.arrived_at_s,
                started_at_s=live.started_at_s,
                first_token_at_s=live.first_token_at_s,
                ended_at_s=at_s,
                output_tokens=live.emitted,
                preemptions=live.preemptions,
                aborted=aborted,
            )
        )

    def _wait(self, live: _Live) -> None:
        heapq.heappush(self._waiting, (live.key, live))

    def _victim(self) -> _Live:
        """The lowest-priority running request, the youngest among equals; under FCFS the last to be admitted."""
        if self.profile.scheduling is Scheduling.FCFS:
            return self._running[-1]
        return max(self._running, key=lambda live: live.key)

    def _preempt(self, live: _Live) -> None:
        self._running.remove(live)
        self._free(live)
        live.computed = 0
        live.preemptions += 1
        self.preemptions += 1
        self._wait(live)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.profile.block_size)

    def _grow(self, live: _Live, tokens: int) -> bool:
        """Hold KV blocks for so many tokens; False, and nothing taken, where too few are free."""
        more = self._blocks(tokens) - live.blocks
        if more > self.free_blocks:
            return False
        self.free_blocks -= more
        live.blocks += more
        return True

    def _free(self, live: _Live) -> None:
        self.free_blocks += live.blocks
        live.blocks = 0
