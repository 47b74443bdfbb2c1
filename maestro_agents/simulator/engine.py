"""One vLLM engine with continuous batching, as a model: no I/O, no clock; every call says what time it is.

The rules, in the order in which a step applies them:

1. A step has a budget of tokens. Running requests come first: one token each where they decode, a chunk of what is
   left of their prompt where they prefill.
2. A running request that finds no free KV block preempts the lowest-priority running one (the youngest among equals),
   itself if need be. The victim loses its KV and waits again; it will recompute prompt and answer so far.
3. Where nobody was preempted, waiting requests are admitted in order, as long as a place in the batch, budget, and KV
   blocks for all their tokens so far are free. Order: (priority, arrival, id), lower first; under FCFS by submission.
   What the KV blocks still hold of a prompt (`EngineRequest.prefix`, `prefix_cache`) is not computed again.
4. The step takes ``base_s + prefill tokens x prefill_s_per_token + tokens up to each of these x prefill_read_s_per_token +
   decoding requests x decode_s_per_seq + tokens in the KV of the decoding requests x kv_read_s_per_token + requests that
   start in it x request_s``. At its end every request whose tokens are all computed has one token more.

A high-priority arrival never displaces a running request while KV blocks suffice: so does vLLM.

Between two events (a prompt to compute, an end, KV blocks that run short, room for a waiting request) all steps are
alike but for the KV read, which grows by the same amount each step: `Engine` leaps over them, so that a request costs the
same however long its answer. ``tests/engine_by_steps.py`` is the same model step by step: the specification, to which a
test holds this one.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from maestro_agents.simulator.prefix_cache import Prefix, PrefixCache


class Scheduling(enum.StrEnum):
    """The order of the waiting queue (vLLM ``--scheduling-policy``)."""

    FCFS = "fcfs"
    PRIORITY = "priority"


COSTS: Final = (
    "base_s",
    "prefill_s_per_token",
    "prefill_read_s_per_token",
    "decode_s_per_seq",
    "kv_read_s_per_token",
    "request_s",
)
"""What a step's seconds are made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineProfile:
    """How fast an engine is and how much fits. The defaults are round numbers of no GPU in particular."""

    #: Seconds that every step takes, whatever it does.
    base_s: float = 0.008
    prefill_s_per_token: float = 0.0001
    #: Seconds that each token up to a prompt token adds to the computing of that: attention, which grows with the square of
    #: a prompt. A chunk of n tokens after c others reads n c + n (n + 1) / 2.
    prefill_read_s_per_token: float = 0.0
    #: Seconds that each decoding request adds to a step.
    decode_s_per_seq: float = 0.0002
    #: Seconds that each token in a decoding request's KV adds to a step: decode attention reads all of it, and is bound
    #: by memory (Sarathi-Serve, arXiv 2403.02310, section 3; Vidur, arXiv 2405.05465, predicts it from the same sum).
    kv_read_s_per_token: float = 0.0
    #: Seconds that a request adds to the step in which it starts: what the server does for it (HTTP, tokens, scheduling)
    #: where that takes the model's time, as on a CPU that both share.
    request_s: float = 0.0
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
        if self.base_s <= 0 or min(getattr(self, name) for name in COSTS) < 0:
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
        return dataclasses.replace(self, **{name: getattr(self, name) / speed for name in COSTS})


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
    #: What it may share with others: the texts that its prompt, and its answer, begin with (see `prefix_cache`). Empty:
    #: nothing of it is kept.
    prefix: Prefix = ()

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(f"request {self.request_id}: prompt and output have at least one token each")
        before = 0
        for _, end in self.prefix:
            if end <= before:
                raise ValueError(f"request {self.request_id}: each text of its prefix ends after the one before")
            before = end


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """The end of a request, with its moments; ``inf`` for what never happened."""

    request: EngineRequest
    arrived_at_s: float
    ended_at_s: float
    started_at_s: float = math.inf
    first_token_at_s: float = math.inf
    output_tokens: int = 0
    #: Tokens that were in the KV when it first started.
    cached_tokens: int = 0
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
    """A request that waits, prefills or decodes."""

    request: EngineRequest
    arrived_at_s: float
    #: Its place among the waiting.
    key: tuple[float | int | str, ...]
    #: The number of the admission that it runs by; 0 while it waits.
    admitted: int = 0
    #: While it decodes: how many steps the engine had done when it had no token yet, were each of its tokens a step.
    since: int | None = None
    #: Tokens of the answer, while it does not decode (`Engine._emitted`).
    emitted: int = 0
    #: Tokens whose KV exists and blocks held, while it prefills.
    computed: int = 0
    blocks: int = 0
    #: Tokens that it holds in the prefix cache.
    held: int = 0
    cached: int = 0
    started_at_s: float = math.inf
    first_token_at_s: float = math.inf
    preemptions: int = 0


MoreBlocks = Callable[[int, int], int]
"""Asked where KV blocks run short: (how many would do without forgetting prefixes, how many are missing even so) -> how many
there are from now on besides. It must not call the engine that asks."""


class Engine:
    """The model. Time only moves forward: a ``now_s`` before the last one counts as the last one.

    Calls between two `step`s may come at any moments; a late `step` gives what the punctual ones would have given. What
    can be seen is as of the last call.

    ``more``: where further KV blocks come from, for an engine whose blocks are not all its own from the start.
    """

    def __init__(self, profile: EngineProfile, *, more: MoreBlocks | None = None) -> None:
        self.profile = profile
        self.preemptions = 0
        self.num_blocks = profile.num_blocks
        self._more = more
        self._admits = self._runs = True
        self._slower = 1.0
        self._cache = PrefixCache(profile.block_size)
        self._now_s = -math.inf
        self._submitted = 0
        self._admitted = 0
        self._live: dict[str, _Live] = {}
        #: In the order of admission. At most one has a part of its prompt to compute: the last.
        self._running: dict[str, _Live] = {}
        self._waiting: list[tuple[tuple[float | int | str, ...], _Live]] = []
        #: Blocks of no running request; below zero where `resize` took more than there were.
        self._free = profile.num_blocks
        self._ended: list[RequestRecord] = []
        #: By request, what `step` told of its tokens.
        self._told: dict[str, int] = {}
        self._preemptions_told = 0

        # Those that decode, all at once: each gets a token in every step.
        #: Steps done, ever.
        self._steps = 0
        self._decoding = 0
        #: Tokens in their KV.
        self._kv_tokens = 0
        #: How many of them need a new block in the steps n, n + block_size, n + 2 block_size...
        self._growing = [0] * profile.block_size
        #: (steps done at its end, admission, who); entries of those that left in another way stay until they come up.
        self._endings: list[tuple[int, int, _Live]] = []

        # The plan: so many steps alike, the first of ``_first_s`` seconds, each ``_more_s`` longer than the one before.
        self._length = 0
        self._done = 0
        self._begun_at_s = -math.inf
        self._first_s = 0.0
        self._more_s = 0.0
        self._over_at_s = math.inf
        #: Who computes how many tokens of a prompt in it: a plan with any has one step.
        self._prefill: list[tuple[_Live, int]] = []
        #: How many requests start in it.
        self._starting = 0

    # -- what can be seen --------------------------------------------------------------------------------------------
    @property
    def wake_at_s(self) -> float:
        """When the next `step` has something to tell; ``inf`` while idle."""
        return self._end_at_s(self._done + 1) if self._length else math.inf

    @property
    def next_end_s(self) -> float:
        """A moment before which no request ends unless somebody calls meanwhile; ``inf`` while idle.

        For who asks `ended`: often one has ended then; if not, what the steps do has changed, and there is a next moment.
        """
        return self._over_at_s

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._live) - len(self._running)

    @property
    def free_blocks(self) -> int:
        """KV blocks of no running request; those that hold a prefix for later count as free."""
        return max(self._free, 0)

    @property
    def used_blocks(self) -> int:
        """KV blocks of running requests; more than `num_blocks` where `resize` took some of theirs."""
        return self.num_blocks - self._free

    @property
    def kept_blocks(self) -> int:
        """Free KV blocks that hold a prefix for later."""
        return self._cache.blocks

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks in use, 0..1."""
        return 1 - self.free_blocks / self.num_blocks

    # -- what can be said --------------------------------------------------------------------------------------------
    def submit(self, request: EngineRequest, now_s: float) -> bool:
        """Queue a request. False: the queue is full. Raises ValueError for a known id or one that could never fit."""
        if request.request_id in self._live:
            raise ValueError(f"request {request.request_id} is already here")
        p = self.profile
        total = request.prompt_tokens + request.output_tokens
        if total > p.max_model_len:
            raise ValueError(f"request {request.request_id}: {total} tokens, max_model_len={p.max_model_len}")
        self._advance(now_s)
        if p.max_queued is not None and len(self._live) >= p.max_queued:
            return False
        self._submitted += 1
        by_priority = p.scheduling is Scheduling.PRIORITY
        key = (request.priority, self._now_s, request.request_id) if by_priority else (self._submitted,)
        live = _Live(request=request, arrived_at_s=self._now_s, key=key)
        self._live[request.request_id] = live
        heapq.heappush(self._waiting, (key, live))
        if not self._length:
            self._plan()
        elif self._waiting[0][1] is live and self._fits(live):
            self._cut()
        return True

    def abort(self, request_id: str, now_s: float) -> bool:
        """End a request at once, its KV blocks free; what the step in progress computes for it is lost. False: unknown."""
        self._advance(now_s)
        live = self._live.get(request_id)
        if live is None:
            return False
        if live.admitted:
            self._stop(live, self._blocks_of(live))
        else:
            self._waiting.remove((live.key, live))
            heapq.heapify(self._waiting)
        self._end(live, aborted=True)
        self._cut()
        return True

    def clear_cache(self, now_s: float) -> None:
        """Forget the prefixes that no running request uses (vLLM's ``/sleep``, ``/reset_prefix_cache``)."""
        self._advance(now_s)
        self._cache.shrink(0)

    def resize(self, num_blocks: int, now_s: float) -> None:
        """Have so many KV blocks from the next step on. Where more are in use, who needs a new one must preempt.

        Raises ValueError for fewer than one request of ``max_model_len`` needs.
        """
        if num_blocks * self.profile.block_size < self.profile.max_model_len:
            raise ValueError(f"{num_blocks} KV blocks do not hold one request of {self.profile.max_model_len} tokens")
        self._advance(now_s)
        self._take(self.num_blocks - num_blocks)
        self.num_blocks = num_blocks
        self._cut()

    def give_back(self, blocks: int, now_s: float) -> int:
        """Have up to so many KV blocks less, of those that no request uses; return how many."""
        self._advance(now_s)
        given = min(blocks, self.free_blocks)
        self._take(given)
        self.num_blocks -= given
        self._cut()
        return given

    def look_again(self, now_s: float) -> None:
        """There may be more KV blocks than it was told when it asked: who waits for some asks again."""
        self._advance(now_s)
        self._cut()

    def pause(self, now_s: float, *, frozen: bool) -> None:
        """Admit nobody until `resume`; ``frozen``: once the step in progress is over, let nobody run either."""
        self._advance(now_s)
        self._admits, self._runs = False, not frozen
        self._cut()

    def resume(self, now_s: float) -> None:
        """Go on after a `pause`."""
        self._advance(now_s)
        self._admits = self._runs = True
        if self._length:
            self._cut()
        else:
            self._plan()

    def drop_kv(self, now_s: float) -> None:
        """All KV is lost (vLLM's ``/sleep``): who runs is preempted, and prefixes are forgotten."""
        self._advance(now_s)
        for live in list(self._running.values()):
            self._preempt(live, self._blocks_of(live))
        self._cache.shrink(0)
        self._cut()

    def slow(self, factor: float, now_s: float) -> None:
        """From the next step on each takes ``factor`` times its seconds: so many engines take turns on the GPU."""
        self._advance(now_s)
        if factor != self._slower:
            self._slower = factor
            self._cut()

    def step(self, now_s: float) -> Progress:
        """Let time pass until ``now_s`` and tell what happened since the last call."""
        self._advance(now_s)
        tokens: dict[str, int] = {}
        for record in self._ended:
            name = record.request.request_id
            if new := record.output_tokens - self._told.pop(name, 0):
                tokens[name] = tokens.get(name, 0) + new
        preempted = self.preemptions > self._preemptions_told
        self._preemptions_told = self.preemptions
        for name, live in (self._live if preempted else self._running).items():
            emitted = self._emitted(live)
            if new := emitted - self._told.get(name, 0):
                tokens[name] = tokens.get(name, 0) + new
                self._told[name] = emitted
        progress = Progress(tokens=tokens, ended=tuple(self._ended))
        self._ended = []
        return progress

    def ended(self, now_s: float) -> tuple[RequestRecord, ...]:
        """As `step`, for who does not count tokens as they come: which requests ended, in order."""
        self._advance(now_s)
        if not self._ended:
            return ()
        ended = tuple(self._ended)
        for record in ended:
            self._told.pop(record.request.request_id, None)
        self._ended = []
        return ended

    def emitted(self, request_id: str, now_s: float) -> int:
        """Output tokens of a request so far; 0 where it is not here (any more)."""
        self._advance(now_s)
        live = self._live.get(request_id)
        return self._emitted(live) if live else 0

    # -- time --------------------------------------------------------------------------------------------------------
    def _end_at_s(self, steps: int) -> float:
        """When so many steps of the plan are done."""
        return self._begun_at_s + (steps * self._first_s + self._more_s * (steps * (steps - 1) // 2))

    def _advance(self, now_s: float) -> None:
        while self._over_at_s <= now_s and self._length:
            if self._length > self._done + 1:
                self._leap(self._length - self._done - 1)
            self._now_s = self._over_at_s
            self._end_step()
            self._plan()
        if self._length > self._done + 1 and (steps := self._done_at(now_s) - self._done):
            self._leap(steps)
        self._now_s = max(self._now_s, now_s)

    def _done_at(self, now_s: float) -> int:
        """How many steps of the plan, of which not all are, are done at ``now_s``."""
        most = self._length - 1
        if self._end_at_s(self._done + 1) > now_s:
            return self._done
        # Solve _end_at_s(n) = now_s, then mend what rounding did.
        even_s, past_s = self._first_s - self._more_s / 2, now_s - self._begun_at_s
        n = int(2 * past_s / (even_s + math.sqrt(even_s * even_s + 2 * self._more_s * past_s)))
        n = min(max(n, self._done), most)
        while n < most and self._end_at_s(n + 1) <= now_s:
            n += 1
        while n > self._done and self._end_at_s(n) > now_s:
            n -= 1
        return n

    def _leap(self, steps: int) -> None:
        """Do so many steps, and begin another, of a plan that has one more at least."""
        size = self.profile.block_size
        cycles, rest = divmod(steps, size)
        start = (self._steps + 1) % size
        grown = cycles * self._decoding + sum(self._growing[start : start + rest])
        if start + rest > size:
            grown += sum(self._growing[: start + rest - size])
        self._take(grown)
        self._done += steps
        self._steps += steps
        self._kv_tokens += steps * self._decoding

    def _cut(self) -> None:
        """Decide anew after the step in progress."""
        if self._length > self._done + 1:
            self._length = self._done + 1
            self._over_at_s = self._end_at_s(self._length)

    # -- a step ------------------------------------------------------------------------------------------------------
    def _plan(self) -> None:
        """Decide the next steps at ``_now_s``: one, or more where they are alike."""
        if not self._runs:
            self._length = self._done = 0
            self._over_at_s = math.inf
            return
        p = self.profile
        last = self._prefill[-1][0] if self._prefill else None
        self._prefill = []
        self._starting = 0
        partial = last if last is not None and last.admitted and last.since is None else None
        n = grown = 0
        if partial is not None:
            n = min(self._left(partial), p.step_tokens - self._decoding)
            grown = self._blocks(partial.computed + n) - partial.blocks
        wanted = self._growing[self._steps % p.block_size] + grown
        preempted = not self._has(wanted)
        if preempted:
            n = self._squeeze()
        else:
            self._take(wanted)
            if partial is not None:
                partial.blocks += grown
        if n and partial is not None:
            self._compute(partial, n)
        budget = p.step_tokens - self._decoding - n
        admits = self._admits and not preempted
        while admits and self._waiting and budget > 0 and self._fits(live := self._waiting[0][1]):
            heapq.heappop(self._waiting)
            budget -= self._admit(live, budget)

        decoding, kv_tokens, prefill, reads = self._decoding, self._kv_tokens, 0, 0
        for live, computing in self._prefill:
            if computing == 1 and live.emitted:  # lost its KV, and most was there again: a decode like any other
                decoding += 1
                kv_tokens += live.computed + 1
            else:
                prefill += computing
                reads += computing * (2 * live.computed + computing + 1) // 2
        self._begun_at_s = self._now_s
        self._first_s = (
            p.base_s
            + prefill * p.prefill_s_per_token
            + reads * p.prefill_read_s_per_token
            + decoding * p.decode_s_per_seq
            + kv_tokens * p.kv_read_s_per_token
            + self._starting * p.request_s
        )
        self._more_s = decoding * p.kv_read_s_per_token
        if self._slower != 1.0:
            self._first_s *= self._slower
            self._more_s *= self._slower
        self._done = 0
        self._length = 1 if self._prefill or preempted else self._alike() if self._decoding else 0
        self._over_at_s = self._end_at_s(self._length) if self._length else math.inf

    def _alike(self) -> int:
        """How many steps nobody ends in, but in the last, and that find their blocks, where all that run decode.

        Nobody is admitted either: who does not fit now does not until blocks or a place in the batch come free.
        """
        while self._endings[0][1] != self._endings[0][2].admitted:
            heapq.heappop(self._endings)  # it left
        steps = self._endings[0][0] - self._steps
        size, room = self.profile.block_size, self.free_blocks
        cycles = room // self._decoding  # in each every one takes a block
        if cycles * size >= steps:
            return steps
        n = 1 + cycles * size
        room -= cycles * self._decoding
        while n < steps and (wanted := self._growing[(self._steps + n) % size]) <= room:
            room -= wanted
            n += 1
        return min(n, steps)

    def _end_step(self) -> None:
        """The step in progress, the plan's last, is over at ``_now_s``."""
        self._steps += 1
        self._kv_tokens += self._decoding
        while self._endings and self._endings[0][0] <= self._steps:
            _, admitted, live = heapq.heappop(self._endings)
            if live.admitted == admitted:
                self._finish(live)
        for live, n in self._prefill:
            if not live.admitted:
                continue  # aborted meanwhile
            live.computed += n
            if self._left(live):
                continue  # more of its prompt is to come
            if live.first_token_at_s == math.inf:
                live.first_token_at_s = self._now_s
            live.emitted += 1
            if live.emitted == live.request.output_tokens:
                self._finish(live)
            else:
                self._decode(live)

    def _finish(self, live: _Live) -> None:
        """It has its last token, whose KV is never computed."""
        self._stop(live, self._blocks(live.request.prompt_tokens + live.request.output_tokens - 1))
        self._end(live)

    # -- who runs ----------------------------------------------------------------------------------------------------
    def _fits(self, live: _Live) -> bool:
        """Whether a waiting request could be admitted now, as far as places and blocks go."""
        places = self.profile.max_num_seqs - len(self._running)
        return places > 0 and self._has(self._blocks(live.request.prompt_tokens + live.emitted))

    def _admit(self, live: _Live, budget: int) -> int:
        """Let a waiting request run; return how much of the step's budget it takes."""
        request = live.request
        self._admitted += 1
        live.admitted = self._admitted
        self._running[request.request_id] = live
        known = request.prompt_tokens + live.emitted
        if request.prefix:  # one token at least must be computed, to have the next
            live.computed = self._cache.hit(request.prefix, known - 1)
        if live.started_at_s == math.inf:
            live.started_at_s = self._now_s
            live.cached = live.computed
            self._starting += 1
        n = min(known - live.computed, budget)
        self._compute(live, n)  # before blocks are taken, lest those that it hit are
        live.blocks = self._blocks(live.computed + n)
        self._take(live.blocks)
        return n

    def _compute(self, live: _Live, n: int) -> None:
        """Have the next step compute ``n`` tokens of a prompt."""
        self._prefill.append((live, n))
        if live.request.prefix:
            self._cache.hold(live.request.prefix, live.held, live.computed + n)
            live.held = live.computed + n

    def _decode(self, live: _Live) -> None:
        """Count a request, whose prompt is computed and whose next token has come, among those that decode."""
        request = live.request
        live.since = since = self._steps - live.emitted
        self._decoding += 1
        self._kv_tokens += request.prompt_tokens + live.emitted
        self._growing[(since - request.prompt_tokens + 1) % self.profile.block_size] += 1
        heapq.heappush(self._endings, (since + request.output_tokens, live.admitted, live))

    def _stop(self, live: _Live, blocks: int) -> None:
        """Take a running request, that holds so many blocks, out of the batch."""
        request = live.request
        if live.since is not None:
            live.emitted = self._emitted(live)
            live.computed = request.prompt_tokens + live.emitted - 1
            self._decoding -= 1
            self._kv_tokens -= request.prompt_tokens + live.emitted
            self._growing[(live.since - request.prompt_tokens + 1) % self.profile.block_size] -= 1
            live.since = None
        del self._running[request.request_id]
        if request.prefix:
            self._cache.release(request.prefix, live.held, max(live.held, live.computed))
        self._take(-blocks)
        live.admitted = live.computed = live.blocks = live.held = 0

    def _end(self, live: _Live, *, aborted: bool = False) -> None:
        """Record the end of a request that does not run any more, now."""
        del self._live[live.request.request_id]
        self._ended.append(
            RequestRecord(
                request=live.request,
                arrived_at_s=live.arrived_at_s,
                started_at_s=live.started_at_s,
                first_token_at_s=live.first_token_at_s,
                ended_at_s=self._now_s,
                output_tokens=live.emitted,
                cached_tokens=live.cached,
                preemptions=live.preemptions,
                aborted=aborted,
            )
        )

    def _squeeze(self) -> int:
        """Give all that run the blocks of the next step, one by one, where they do not suffice: some lose theirs.

        Returns how many tokens of its prompt the request that prefills computes; 0 where there is none any more.
        """
        n = 0
        blocks = {name: self._blocks_of(live, before=1) for name, live in self._running.items()}
        for name, live in list(self._running.items()):
            if not live.admitted:
                continue
            if live.since is None:  # the last of all: it gets what the others leave
                n = min(self._left(live), self.profile.step_tokens - self._decoding)
            more = self._blocks(live.computed + n if live.since is None else self._known(live)) - blocks[name]
            while more > self.free_blocks:
                victim = self._victim()
                self._preempt(victim, blocks[victim.request.request_id])
                if victim is live:
                    n = 0
                    break
            else:
                self._take(more)
                live.blocks = blocks[name] = blocks[name] + more
        return n

    def _victim(self) -> _Live:
        """The lowest-priority running request, the youngest among equals; under FCFS the last to be admitted."""
        if self.profile.scheduling is Scheduling.FCFS:
            return next(reversed(self._running.values()))
        return max(self._running.values(), key=lambda live: live.key)

    def _preempt(self, live: _Live, blocks: int) -> None:
        self._stop(live, blocks)
        live.preemptions += 1
        self.preemptions += 1
        heapq.heappush(self._waiting, (live.key, live))

    # -- tokens and blocks -------------------------------------------------------------------------------------------
    def _emitted(self, live: _Live) -> int:
        """Tokens of its answer so far."""
        return live.emitted if live.since is None else self._steps - live.since

    def _known(self, live: _Live) -> int:
        """Tokens whose KV must exist before the next token can come."""
        return live.request.prompt_tokens + self._emitted(live)

    def _left(self, live: _Live) -> int:
        """Tokens that a request that prefills has to compute still."""
        return live.request.prompt_tokens + live.emitted - live.computed

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.profile.block_size)

    def _blocks_of(self, live: _Live, *, before: int = 0) -> int:
        """Blocks of a running request in the step in progress; of one that decodes, ``before=1``: in the one before."""
        return live.blocks if live.since is None else self._blocks(self._known(live) - before)

    def _has(self, blocks: int) -> bool:
        """Whether so many blocks are free, or can be had."""
        if self._more is not None and blocks > self._free - self._cache.blocks:
            more = self._more(blocks - self._free + self._cache.blocks, max(0, blocks - self._free))
            self.num_blocks += more
            self._free += more
        return blocks <= self.free_blocks

    def _take(self, blocks: int) -> None:
        """Have fewer free blocks, or more; of prefixes no more is kept than they hold."""
        self._free -= blocks
        if self._cache.blocks > self._free:
            self._cache.shrink(self.free_blocks)
