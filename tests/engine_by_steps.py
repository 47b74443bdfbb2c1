"""The engine model step by step, as its rules say it: the specification of `maestro_agents.simulator.engine`."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from maestro_agents.simulator.engine import EngineProfile, EngineRequest, Progress, RequestRecord, Scheduling
from maestro_agents.simulator.prefix_cache import PrefixCache


@dataclass(kw_only=True, slots=True, eq=False)
class _Live:
    """A request that waits or runs."""

    request: EngineRequest
    arrived_at_s: float
    #: Its place among the waiting.
    key: tuple[float | int | str, ...]
    #: Tokens that it had when it was admitted: only what it computes of these can be hit while it runs.
    prefill: int = 0
    computed: int = 0
    emitted: int = 0
    blocks: int = 0
    started_at_s: float = math.inf
    first_token_at_s: float = math.inf
    preemptions: int = 0
    #: Tokens that it holds in the prefix cache, and that it found there at first.
    held: int = 0
    cached: int = 0

    @property
    def known(self) -> int:
        """Tokens whose KV must exist before the next token can come."""
        return self.request.prompt_tokens + self.emitted


class EngineBySteps:
    """As `engine.Engine`, at the cost of a loop over all that runs for every token."""

    def __init__(self, profile: EngineProfile) -> None:
        self.profile = profile
        self.preemptions = 0
        self.num_blocks = profile.num_blocks
        #: Below zero where `resize` took more than there were.
        self._free = profile.num_blocks
        self._cache = PrefixCache(profile.block_size)
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
        return 1 - self.free_blocks / self.num_blocks

    @property
    def free_blocks(self) -> int:
        return max(self._free, 0)

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
            self._leave(live)
        else:
            self._waiting.remove((live.key, live))
            heapq.heapify(self._waiting)
        self._end(live, self._now_s, aborted=True)
        return True

    def clear_cache(self, now_s: float) -> None:
        """Forget the prefixes that no running request uses."""
        self._advance(now_s)
        self._cache.shrink(0)

    def resize(self, num_blocks: int, now_s: float) -> None:
        """Have so many KV blocks from the next step on."""
        self._advance(now_s)
        self._free += num_blocks - self.num_blocks
        self.num_blocks = num_blocks
        self._cache.shrink(self.free_blocks)

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
        starting = 0
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
                if live.computed < live.prefill:
                    self._hold(live, live.computed + n)
        while not preempted and self._waiting and budget > 0 and len(self._running) < self.profile.max_num_seqs:
            live = self._waiting[0][1]
            if self._blocks(live.known) > self._free:
                break
            heapq.heappop(self._waiting)
            self._running.append(live)
            live.prefill = live.known
            live.computed = self._cache.hit(live.request.prefix, live.known - 1)
            if live.started_at_s == math.inf:
                live.started_at_s = self._now_s
                live.cached = live.computed
                starting += 1
            n = min(live.known - live.computed, budget)
            self._hold(live, live.computed + n)
            self._grow(live, live.computed + n)
            plan[live.request.request_id] = (live, n)
            budget -= n
        self._scheduled = list(plan.values())
        if not self._scheduled:
            self._ends_at_s = math.inf
            return
        decoding = [live for live, n in self._scheduled if n == 1 and live.emitted]
        prefill = sum(n for _, n in self._scheduled) - len(decoding)
        computing = [(live, n) for live, n in self._scheduled if not (n == 1 and live.emitted)]
        reads = sum(live.computed + i for live, n in computing for i in range(1, n + 1))
        p = self.profile
        self._ends_at_s = (
            self._now_s
            + p.base_s
            + prefill * p.prefill_s_per_token
            + reads * p.prefill_read_s_per_token
            + len(decoding) * p.decode_s_per_seq
            + sum(live.computed + 1 for live in decoding) * p.kv_read_s_per_token
            + starting * p.request_s
        )

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
                self._leave(live)
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
                cached_tokens=live.cached,
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
        self._leave(live)
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
        self._free -= more
        live.blocks += more
        self._cache.shrink(self.free_blocks)
        return True

    def _hold(self, live: _Live, tokens: int) -> None:
        """What it computes of its prompt can be hit."""
        self._cache.hold(live.request.prefix, live.held, tokens)
        live.held = tokens

    def _leave(self, live: _Live) -> None:
        """Take a running request out of the batch; its blocks are free, and can be hit until they are needed."""
        self._running.remove(live)
        self._free += live.blocks
        self._cache.release(live.request.prefix, live.held, max(live.held, live.computed))
        self._cache.shrink(self.free_blocks)
        live.blocks = live.held = live.computed = 0
