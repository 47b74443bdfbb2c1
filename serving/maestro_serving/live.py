"""The engine model on the real clock, with vLLM's metrics about it.

Sleeps until the model's next step ends, at least `TICK_S`: at high speed several steps are told at once, as a loaded
vLLM tells several tokens in one chunk. While nothing runs, nothing is awake.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Generator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from maestro_agents.simulator.engine import Engine, EngineProfile, EngineRequest, Progress, RequestRecord

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


class LiveEngine:
    """One model's engine. Belongs to the event loop that first submits to it."""

    def __init__(self, name: str, profile: EngineProfile, *, index: int, metrics: Metrics) -> None:
        self.name = name
        self.profile = profile
        self._model = Engine(profile)
        self._metrics = metrics
        self._labels = {"model_name": name, "engine": str(index)}
        self._flows: dict[str, Flow] = {}
        self._reasons: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None
        self._preemptions_told = 0
        metrics.running.labels(**self._labels).set_function(lambda: self._seen().num_running)
        metrics.waiting.labels(**self._labels).set_function(lambda: self._seen().num_waiting)
        metrics.kv_usage.labels(**self._labels).set_function(lambda: self._seen().kv_usage)
        metrics.cache_config.labels(
            engine=str(index),
            block_size=str(profile.block_size),
            num_gpu_blocks=str(profile.num_blocks),
            kv_cache_size_tokens=str(profile.kv_tokens),
        ).set(1)
        metrics.rejections.labels(model_name=name, reason="max_num_queued_reqs")
        for family in (metrics.preemptions, metrics.prompt_tokens, metrics.generation_tokens):
            family.labels(**self._labels)
        for histogram in (metrics.ttft, metrics.e2e, metrics.queue_time):
            histogram.labels(**self._labels)
        for reason in _FINISH_REASONS:
            metrics.success.labels(**self._labels, finished_reason=reason)

    @contextlib.contextmanager
    def run(self, requests: Sequence[EngineRequest], reasons: Sequence[str]) -> Generator[list[Flow]]:
        """Submit requests together; whatever has not ended when the caller leaves is aborted. Raises `EngineBusyError`.

        ``reasons``: how each will have finished (``stop``, ``length``), for the metrics.
        """
        flows: list[Flow] = []
        try:
            for request, reason in zip(requests, reasons, strict=True):
                if not self._model.submit(request, time.monotonic()):
                    self._metrics.rejections.labels(model_name=self.name, reason="max_num_queued_reqs").inc()
                    raise EngineBusyError
                flow = Flow(request)
                flows.append(flow)
                self._flows[request.request_id] = flow
                self._reasons[request.request_id] = reason
            self._start()
            yield flows
        finally:
            for flow in flows:
                if flow.record is None:
                    self._model.abort(flow.request.request_id, time.monotonic())
            self._tell(self._model.step(time.monotonic()))

    def _seen(self) -> Engine:
        """The model as it is now, for whoever reads the metrics."""
        self._tell(self._model.step(time.monotonic()))
        return self._model

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._pump(), name=f"engine {self.name}")

    async def _pump(self) -> None:
        while (wake_at_s := self._model.wake_at_s) < math.inf:
            await asyncio.sleep(max(wake_at_s - time.monotonic(), TICK_S))
            self._tell(self._model.step(time.monotonic()))

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
                reason = self._reasons.pop(request_id)
                if not record.aborted:  # vLLM does not count what its client abandoned
                    m.prompt_tokens.labels(**self._labels).inc(record.request.prompt_tokens)
                    m.success.labels(**self._labels, finished_reason=reason).inc()
                    m.ttft.labels(**self._labels).observe(record.ttft_s)
                    m.e2e.labels(**self._labels).observe(record.ended_at_s - record.arrived_at_s)
                    m.queue_time.labels(**self._labels).observe(record.queue_s)
        m.preemptions.labels(**self._labels).inc(self._model.preemptions - self._preemptions_told)
        self._preemptions_told = self._model.preemptions
