"""Between tenants: how far each is ahead of its weighted fair share of the fleet.

A virtual clock per tenant (Zhang, SIGCOMM 1990): every stage moves it on by the stage's predicted work at the rate that is the
tenant's share. What it is ahead of the clock of the tenant that is least ahead is the stage's debt, in seconds, by which
it lets others pass. So a tenant that floods the pool waits behind itself; one alone, or several that ask for as much, never
do; and nothing is left idle, since a debt is a place in the order and no limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

MAX_TENANTS: Final = 10_000

ACTIVE_S: Final = 60.0
"""A tenant that pushed nothing for so long, and whose work is done, does not count as one to share with."""


class Shares:
    """The clocks. No time inside: every call says what time it is."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        #: Tenant -> when what it asked for so far would be served if it had its share alone; when it last asked.
        self._clocks: dict[str, tuple[float, float]] = {}

    def charge(self, tenant: str, work_s: float, *, slots: int, now_s: float) -> float:
        """Take a stage of ``work_s`` predicted seconds in one of the fleet's ``slots``; return its debt in seconds."""
        for name, (until_s, asked_at_s) in list(self._clocks.items()):
            if max(until_s, asked_at_s + ACTIVE_S) < now_s:
                del self._clocks[name]
        until_s = max(now_s, self._clocks.pop(tenant, (now_s, now_s))[0])
        others = min((max(now_s, other) for other, _ in self._clocks.values()), default=until_s)
        weight = self._weights.get(tenant, 1.0)
        share = weight / (weight + sum(self._weights.get(other, 1.0) for other in self._clocks))
        self._clocks[tenant] = (until_s + work_s / (max(1, slots) * share), now_s)
        while len(self._clocks) > MAX_TENANTS:
            del self._clocks[next(iter(self._clocks))]
        return max(0.0, until_s - others)
