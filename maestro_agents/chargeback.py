"""Usage per tenant: the leader folds the observation log into counters of days, each entry once, also over takeovers.

A counter is named by ``[tenant, model, service class, what]`` (JSON), its day is the UTC day on which the stage ended:

- ``stages``; ``failed`` of them; ``late``: ended after the deadline of their run,
- ``prompt_tokens``, ``cached_tokens`` (of the prompt, found in the prefix cache), ``output_tokens``,
- ``gpu_ms``: milliseconds from grant to last byte x the engine's GPUs / its slots, halved where two engines are awake on those GPUs.
  An engine runs at most as many stages as it has slots, so over all tenants that is never more than wall time x GPUs (nested calls
  beyond the slots alone come on top), and an idle slot is nobody's.

Calls that were only observed went to their caller's own URL, and are not counted.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Final

from maestro_agents.core import Observation, RunEnd, Status
from maestro_agents.ports import Queue

log = logging.getLogger("maestro.scheduler")

COUNTERS: Final = ("stages", "failed", "late", "prompt_tokens", "cached_tokens", "output_tokens", "gpu_ms")

FOLD_S: Final = 2.0
"""Seconds between two foldings."""

PAGE: Final = 500
MAX_ENGINES: Final = 10_000

GpuShare = Callable[[str], float | None]
"""Engine id -> GPUs of one of its slots; None where the engine is not known (any more)."""


def fold(entries: Iterable[Observation | RunEnd], gpus: GpuShare) -> dict[str, dict[str, int]]:
    """What entries of the log add to the counters: day -> counter -> how much."""
    days: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for o in entries:
        if not isinstance(o, Observation) or o.observed:
            continue
        counted = {
            "stages": 1,
            "failed": int(o.status is not Status.DONE),
            "late": int(o.finished_at_s > o.deadline_at_s),
            "prompt_tokens": o.prompt_tokens,
            "cached_tokens": o.cached_tokens,
            "output_tokens": o.output_tokens,
            "gpu_ms": round(1000 * o.service_s * (gpus(o.engine_id) or 0.0)),
        }
        day = days[_day(o.finished_at_s)]
        day.update({counter(o.tenant, o.model, o.service_class, what): n for what, n in counted.items() if n})
    return {day: dict(counters) for day, counters in days.items()}


def counter(tenant: str, model: str, service_class: str, what: str) -> str:
    """The name of a counter."""
    return json.dumps([tenant, model, str(service_class), what], separators=(",", ":"))


def read(counters: Mapping[str, int]) -> dict[tuple[str, str, str], dict[str, int]]:
    """Counters of a day by (tenant, model, service class). What this version does not know is left out."""
    found: defaultdict[tuple[str, str, str], dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTERS, 0))
    for name, n in counters.items():
        with contextlib.suppress(ValueError):
            tenant, model, service_class, what = json.loads(name)
            if what in COUNTERS:
                found[tenant, model, service_class][what] += n
    return dict(found)


def _day(at_s: float) -> str:
    try:
        return datetime.fromtimestamp(at_s, UTC).date().isoformat()
    except (OverflowError, ValueError, OSError):  # an app with a broken clock
        return datetime.now(UTC).date().isoformat()


class Chargeback:
    """The leader's part. What it knows it has from the queue: a new leader goes on where the last one's word was heard."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._shares: OrderedDict[str, float] = OrderedDict()
        self._at: str | None = None

    def forget(self) -> None:
        """Ask again how far usage was counted: leadership is new, or the store restarted."""
        self._at = None

    async def fold(self, gpus: Mapping[str, float], *, epoch: int) -> None:
        """Count what is new in the log. ``gpus``: GPUs of one slot, by engine; of engines that have gone the last known is used."""
        for engine_id, share in gpus.items():
            self._shares[engine_id] = share
            self._shares.move_to_end(engine_id)
        while len(self._shares) > MAX_ENGINES:
            self._shares.popitem(last=False)
        if self._at is None:
            self._at = await self._queue.charged_to()
        while True:
            to, entries = await self._queue.read_log(self._at, PAGE)
            if to == self._at:
                return
            if not await self._queue.charge(fold(entries, self._shares.get), after=self._at, to=to, epoch=epoch):
                self._at = None  # another leader counted it
                return
            self._at = to
