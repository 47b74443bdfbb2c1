"""Quotas: what of a tenant's work may still start now. Pure functions; the scheduler says what runs and what was used.

A stage takes one of its tenant's ``max_stages``, its KV reservation of ``max_kv_bytes``, and of ``tokens_per_minute`` its prompt and
the output that is reserved for it, until the real numbers are known (`Minutes`). What may not start waits, in its tenant's own order:
stages of others go past it. A nested stage always passes, and counts: its parent runs, and waits for it.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from maestro_agents.tenants import Tenant

MINUTE_S: Final = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """What a tenant holds now, and the tokens that count against its minute."""

    stages: int = 0
    kv_bytes: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """What of a tenant may still start; inf where that is not limited, negative where running stages outgrew it."""

    tenant: Tenant
    stages: float = math.inf
    kv_bytes: float = math.inf
    tokens: float = math.inf

    def lacks(self, *, kv_bytes: int, tokens: int) -> str:
        """The limit for which a stage has to wait; "" where it may start.

        One whose output is only guessed to be more than a whole minute's tokens has the minute to itself.
        """
        if self.stages < 1:
            return "max_stages"
        if kv_bytes > self.kv_bytes:
            return "max_kv_bytes"
        if min(tokens, self.tenant.tokens_per_minute or tokens) > self.tokens:
            return "tokens_per_minute"
        return ""

    def forbids(self, *, kv_bytes: int, prompt_tokens: int) -> str:
        """The limit that a stage is beyond for ever; "" where it need only wait. ``kv_bytes``: the least that it takes."""
        if 0 < self.tenant.max_kv_bytes < kv_bytes:
            return "max_kv_bytes"
        if 0 < self.tenant.tokens_per_minute < prompt_tokens:
            return "tokens_per_minute"
        return ""

    def after(self, *, kv_bytes: int, tokens: int) -> Left:
        """What is left once a stage has started."""
        left = (self.stages - 1, self.kv_bytes - kv_bytes, self.tokens - tokens)
        return dataclasses.replace(self, stages=left[0], kv_bytes=left[1], tokens=left[2])


def served_in_s(tenant: Tenant, *, stages: int, service_s: float, tokens: float, slots: int) -> float:
    """Seconds in which waiting stages of a tenant will have been served at the best, each of so many seconds and tokens.

    ``slots``: of the fleet, which the tenant may have for itself up to its ``max_stages``.
    """
    at_a_time = max(1, min(slots, tenant.max_stages or slots))
    minutes = stages * tokens / tenant.tokens_per_minute if tenant.tokens_per_minute else 0.0
    return max(stages * service_s / at_a_time, MINUTE_S * minutes)


def may_start(tenants: Iterable[Tenant], used: Mapping[str, Use]) -> dict[str, Left]:
    """What of each tenant that is limited may still start, by its name."""
    return {t.name: _left(t, used.get(t.name, Use())) for t in tenants if t.metered}


def _left(tenant: Tenant, use: Use) -> Left:
    def of(limit: int, used: int) -> float:
        return limit - used if limit else math.inf

    return Left(
        tenant=tenant,
        stages=of(tenant.max_stages, use.stages),
        kv_bytes=of(tenant.max_kv_bytes, use.kv_bytes),
        tokens=of(tenant.tokens_per_minute, use.tokens),
    )


@dataclass(frozen=True, slots=True)
class _Started:
    tenant: str
    at_s: float
    tokens: int
    #: It runs no more, and how many tokens it used was not said (withdrawn, lost): the guess counts until then.
    until_s: float = math.inf


class Minutes:
    """The tokens that count against each tenant's minute. No time inside: every call says what time it is.

    A stage counts with its guess while it runs. Once its real number is known, that counts until a minute after its start,
    and what of it the guess did not cover, until a minute after its end: nothing escapes, and nothing counts twice.
    """

    def __init__(self) -> None:
        self._started: dict[str, _Started] = {}
        self._spent: Counter[str] = Counter()
        #: Until when it counts, whose, how many.
        self._parts: list[tuple[float, str, int]] = []

    def start(self, stage_id: str, tenant: str, *, tokens: int, at_s: float) -> None:
        """A stage was granted; ``tokens``: its prompt and the output that is reserved for it."""
        self._started[stage_id] = _Started(tenant, at_s, tokens)

    def end(self, stage_id: str, tenant: str, *, tokens: int, at_s: float) -> None:
        """A stage has ended; ``tokens``: what it really was."""
        known = self._started.pop(stage_id, None)
        guessed = min(tokens, known.tokens) if known else 0
        self._spend(tenant, guessed, known.at_s if known else at_s)
        self._spend(tenant, tokens - guessed, at_s)

    def _spend(self, tenant: str, tokens: int, at_s: float) -> None:
        if tokens:
            heapq.heappush(self._parts, (at_s + MINUTE_S, tenant, tokens))
            self._spent[tenant] += tokens

    def runs(self, stages: Collection[str], *, waiting: Collection[str], now_s: float) -> None:
        """The stages that run now. One that waits again (given back before its first byte) used nothing."""
        for stage_id, known in list(self._started.items()):
            if stage_id in stages:
                continue
            if stage_id in waiting or known.until_s <= now_s:
                del self._started[stage_id]
            elif known.until_s == math.inf:
                self._started[stage_id] = dataclasses.replace(known, until_s=now_s + MINUTE_S)

    def knows(self, stage_id: str) -> bool:
        """It was started, and its real number is not known."""
        return stage_id in self._started

    def used(self, now_s: float) -> Mapping[str, int]:
        """Tokens by tenant."""
        while self._parts and self._parts[0][0] <= now_s:
            _, tenant, tokens = heapq.heappop(self._parts)
            self._spent[tenant] -= tokens
        found = +self._spent
        for known in self._started.values():
            if known.until_s > now_s:
                found[known.tenant] += known.tokens
        return found
