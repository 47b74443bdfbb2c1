"""The engine model on the real clock, with vLLM's metrics about it.

Sleeps until the model's next step ends, at least `TICK_S`: at high speed several steps are told at once, as a loaded
vLLM tells several tokens in one chunk. While nothing runs, nothing is awake.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Final, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from maestro_agents.simulator.engine import Engine, EngineProfile, EngineRequest, MoreBlocks, Progress, RequestRecord

TICK_S: Final = 0.004
"""The shortest sleep between two looks at the model."""

_TTFT_BUCKETS_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_LATENCY_BUCKETS_S: Final = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
_SLEEP_STATES: Final = ("awake", "weights_offloaded", "discard_all")
_SLEEP_BUCKETS_S: Final = (0.01, 0.1, 1, 10, 30, 60, 120, 300, 600)
_FINISH_REASONS: Final = ("stop", "length", "abort", "error", "repetition")


class EngineBusyError(Exception):
    """The engine's queue is full."""


class Flow:
    """One request's tokens, as they come."""

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        #: Set once, at the end.
        self.record: RequestRecord | None = None
        self._tokens = 0
        self._told = 0
        self._news = asyncio.Event()
        self._end = asyncio.Event()

    async def more(self) -> int:
        """Wait for new tokens and return how many there are in all; the same number again means that it ended."""
        while self._tokens == self._told and self.record is None:
            self._news.clear()
            await self._news.wait()
        self._told = self._tokens
        return self._tokens

    async def end(self) -> RequestRecord:
        """Wait for the end."""
        await self._end.wait()
        if self.record is None:
            raise AssertionError("a flow ends with its record")
        return self.record

    def _add(self, tokens: int, record: RequestRecord | None) -> None:
        self._tokens += tokens
        self.record = record
        self._news.set()
        if record:
            self._end.set()


class Metrics:
    """vLLM's metrics, under its names, of all engines of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("model_name", "engine")

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"vllm:{name}", text, (*labels, *more), registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"vllm:{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"vllm:{name}", text, labels, buckets=buckets, registry=self.registry)

        self.running = gauge("num_requests_running", "Requests in the batch.")
        self.waiting = gauge("num_requests_waiting", "Requests that wait for a place in the batch.")
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of KV blocks in use, 1 is all.")
        self.preemptions = counter("num_preemptions", "Requests that lost their KV blocks to another.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed.")
        self.cached_tokens = counter("prompt_tokens_cached", "Prompt tokens that were found in the prefix cache.")
        self.prefix_queries = counter("prefix_cache_queries", "Tokens looked for in the prefix cache.")
        self.prefix_hits = counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.success = counter("request_success", "Requests answered, by how they ended.", "finished_reason")
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS_S)
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", _LATENCY_BUCKETS_S)
        self.queue_time = histogram("request_queue_time_seconds", "Arrival to first step.", _LATENCY_BUCKETS_S)
        self.rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused because the queue was full.",
            ("model_name", "reason"),
            registry=self.registry,
        )
        self.cache_config = Gauge(
            "vllm:cache_config_info",
            "How the KV cache is laid out.",
            ("engine", "block_size", "num_gpu_blocks", "kv_cache_size_tokens"),
            registry=self.registry,
        )
        self.sleep_state = Gauge(
            "vllm:engine_sleep_state",
            "1 at the state that the engine is in.",
            (*labels, "sleep_state"),
            registry=self.registry,
        )
        self._moving: Gauge | None = None
        self._moved: Histogram | None = None

    @contextlib.contextmanager
    def move(self, operation: str) -> Generator[None]:
        """Count and time a ``sleep`` or a ``wake``. As in vLLM, these metrics are there from the first on."""
        if self._moving is None or self._moved is None:
            self._moving = Gauge(
                "vllm:sleep_mode_operations_in_flight",
                "Sleep and wake calls that are not answered yet.",
                ("operation",),
                registry=self.registry,
            )
            self._moved = Histogram(
                "vllm:sleep_mode_operation_duration_seconds",
                "How long sleep and wake calls took.",
                ("operation",),
                buckets=_SLEEP_BUCKETS_S,
                registry=self.registry,
            )
        since_s = time.monotonic()
        with self._moving.labels(operation).track_inprogress():
            try:
                yield
            finally:
                self._moved.labels(operation).observe(time.monotonic() - since_s)


class LiveEngine:
    """One model's engine. Belongs to the event loop that first submits to it.

    ``more``, ``changed``: for an engine that shares a GPU. Where further KV blocks come from (as for `Engine`), and whom to
    tell that something happened in it.
    """

    def __init__(
        self,
        name: str,
        profile: EngineProfile,
        *,
        index: int,
        metrics: Metrics,
        kv_blocks: int = 0,
        more: MoreBlocks | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.profile = profile
        #: How many KV blocks it may use; what its metrics say is relative to that.
        self.kv_blocks = kv_blocks or profile.num_blocks
        #: Its weights are not those of the model: what it says is noise.
        self.garbled = False
        self.model = Engine(profile, more=more)
        self._metrics = metrics
        self._changed = changed
        self._labels = {"model_name": name, "engine": str(index)}
        self._flows: dict[str, Flow] = {}
        self._reasons: dict[str, str] = {}
        #: Requests that the server itself aborts, and that count as answered.
        self._answered: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._preemptions_told = 0
        #: None while it goes on; else whether those that run are held too.
        self._paused: bool | None = None
        #: As of the last step: running, waiting.
        self.shown = (0, 0)
        self._kv_usage = 0.0
        #: Prompt tokens that were looked for in the prefix cache, and found there.
        self.prefix_queries = 0
        self.prefix_hits = 0
        metrics.running.labels(**self._labels).set_function(lambda: self._look().shown[0])
        metrics.waiting.labels(**self._labels).set_function(lambda: self._look().shown[1])
        metrics.kv_usage.labels(**self._labels).set_function(lambda: self._look()._kv_usage)
        metrics.cache_config.labels(
            engine=str(index),
            block_size=str(profile.block_size),
            num_gpu_blocks=str(self.kv_blocks),
            kv_cache_size_tokens=str(self.kv_blocks * profile.block_size),
        ).set(1)
        metrics.rejections.labels(model_name=name, reason="max_num_queued_reqs")
        counters = (metrics.preemptions, metrics.prompt_tokens, metrics.generation_tokens, metrics.cached_tokens)
        for family in (*counters, metrics.prefix_queries, metrics.prefix_hits):
            family.labels(**self._labels)
        for histogram in (metrics.ttft, metrics.e2e, metrics.queue_time):
            histogram.labels(**self._labels)
        for reason in _FINISH_REASONS:
            metrics.success.labels(**self._labels, finished_reason=reason)
        self.show_sleep(None)

    @contextlib.contextmanager
    def run(self, requests: Sequence[EngineRequest], reasons: Sequence[str]) -> Generator[list[Flow]]:
        """Submit requests together; whatever has not ended when the caller leaves is aborted. Raises `EngineBusyError`.

        ``reasons``: how each will have finished (``stop``, ``length``), for the metrics.
        """
        flows: list[Flow] = []
        try:
            for request, reason in zip(requests, reasons, strict=True):
                if not self.model.submit(request, time.monotonic()):
                    self._metrics.rejections.labels(model_name=self.name, reason="max_num_queued_reqs").inc()
                    raise EngineBusyError
                flow = Flow(request)
                flows.append(flow)
                self._flows[request.request_id] = flow
                self._reasons[request.request_id] = reason
            self.tell()
            yield flows
        finally:
            for flow in flows:
                if flow.record is None:
                    self.model.abort(flow.request.request_id, time.monotonic())
            self.tell()

    # -- what an administrator does ------------------------------------------------------------------------------------
    @property
    def paused(self) -> bool:
        return self._paused is not None

    @property
    def idle(self) -> bool:
        """Nothing runs in it."""
        self.tell()
        return self.model.wake_at_s == math.inf

    def pause(self, *, frozen: bool) -> None:
        """Admit nobody from now on; ``frozen``: once the step in progress is over nobody runs either."""
        self._paused = frozen
        self.model.pause(time.monotonic(), frozen=frozen)
        self.tell()

    def resume(self) -> None:
        self._paused = None
        self.model.resume(time.monotonic())
        self.tell()

    async def quiet(self) -> None:
        """Wait until nothing runs in it."""
        while not self.idle:
            await asyncio.sleep(max(self.model.wake_at_s - time.monotonic(), TICK_S))

    def abort(self, requests: Sequence[str] | None, *, answered: bool) -> int:
        """End requests (None: all) by what their callers call them; they are answered with what they have. How many."""
        wanted = [name for name in self._flows if requests is None or name.rsplit("-", 2)[0] in requests]
        self._answered.update(wanted if answered else ())
        for name in wanted:
            self.model.abort(name, time.monotonic())
        self.tell()
        return len(wanted)

    def drop_kv(self) -> None:
        """All KV is lost: who runs will compute his anew."""
        self.model.drop_kv(time.monotonic())
        self.tell()

    def show_sleep(self, level: int | None) -> None:
        """Have the metrics say a sleep level; None: awake."""
        states = (level is None, level == 1, level == 2)
        for name, on in zip(_SLEEP_STATES, states, strict=True):
            self._metrics.sleep_state.labels(**self._labels, sleep_state=name).set(on)

    # -- time ----------------------------------------------------------------------------------------------------------
    def tell(self) -> None:
        """Bring everybody up to date, and see that it goes on."""
        self._tell(self.model.step(time.monotonic()))
        if self.model.wake_at_s < math.inf and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._pump(), name=f"engine {self.name}")
        self._changed()

    def _look(self) -> Self:
        """For whoever reads the metrics."""
        self._tell(self.model.step(time.monotonic()))
        return self

    async def _pump(self) -> None:
        while (wake_at_s := self.model.wake_at_s) < math.inf:
            await asyncio.sleep(max(wake_at_s - time.monotonic(), TICK_S))
            self._tell(self.model.step(time.monotonic()))
            self._changed()

    def _tell(self, progress: Progress) -> None:
        m = self._metrics
        ended = {record.request.request_id: record for record in progress.ended}
        for request_id in progress.tokens.keys() | ended.keys():
            flow = self._flows[request_id]
            tokens = progress.tokens.get(request_id, 0)
            record = ended.get(request_id)
            flow._add(tokens, record)
            m.generation_tokens.labels(**self._labels).inc(tokens)
            if record:
                del self._flows[request_id]
                self._count(record, self._reasons.pop(request_id))
        m.preemptions.labels(**self._labels).inc(self.model.preemptions - self._preemptions_told)
        self._preemptions_told = self.model.preemptions
        # As in vLLM, what no step follows is not seen: who comes while all is held does not show as waiting.
        if progress.tokens or ended or not self.paused or self.model.wake_at_s < math.inf:
            self.shown = (self.model.num_running, self.model.num_waiting)
            self._kv_usage = self.model.used_blocks / self.kv_blocks

    def _count(self, record: RequestRecord, reason: str) -> None:
        m, name = self._metrics, record.request.request_id
        if record.started_at_s < math.inf:
            self.prefix_queries += record.request.prompt_tokens
            self.prefix_hits += record.cached_tokens
            m.prefix_queries.labels(**self._labels).inc(record.request.prompt_tokens)
            m.prefix_hits.labels(**self._labels).inc(record.cached_tokens)
        if record.aborted and name not in self._answered:
            return  # vLLM does not count what its client abandoned
        self._answered.discard(name)
        m.success.labels(**self._labels, finished_reason="abort" if record.aborted else reason).inc()
        if record.started_at_s == math.inf:
            return
        m.prompt_tokens.labels(**self._labels).inc(record.request.prompt_tokens)
        m.cached_tokens.labels(**self._labels).inc(record.cached_tokens)
        m.queue_time.labels(**self._labels).observe(record.queue_s)
        m.e2e.labels(**self._labels).observe(record.ended_at_s - record.arrived_at_s)
        if record.first_token_at_s < math.inf:
            m.ttft.labels(**self._labels).observe(record.ttft_s)
