"""Tenants: whose work a call is, and what the fleet's owner grants them (``[[tenant]]`` in fleet.toml).

A tenant that no table names weighs 1, has no quota and may be served everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from maestro_agents.core import EngineSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """What one tenant is granted. 0 and empty: no limit."""

    name: str
    #: Of its fair share (`policy.fairness`), against that of others.
    weight: float = 1.0
    #: Its calls are served in these clusters and nowhere else (data residency); empty: everywhere.
    allow_clusters: tuple[str, ...] = ()
    #: Stages of it that hold a grant at a time, over all apps.
    max_stages: int = 0
    #: KV bytes reserved for it at a time.
    max_kv_bytes: int = 0
    #: Prompt and output tokens in any minute; what was reserved counts until the real numbers are known.
    tokens_per_minute: int = 0
    #: Stages of it that may wait; further ones are refused at once, with the moment to try again.
    max_waiting: int = 0

    @property
    def has_quota(self) -> bool:
        """Something of it is limited beyond where it may be served."""
        return bool(self.max_stages or self.max_kv_bytes or self.tokens_per_minute or self.max_waiting)

    @property
    def metered(self) -> bool:
        """A stage of it may have to wait though an engine has room. The fast path, which counts engines alone, is not for it."""
        return bool(self.max_stages or self.max_kv_bytes or self.tokens_per_minute)

    def may_use(self, cluster: str) -> bool:
        """Its calls may be served there."""
        return not self.allow_clusters or cluster in self.allow_clusters

    def encode(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def decode(cls, body: Mapping[str, Any]) -> Tenant:
        """Read one of this version or a newer one, whose further fields are ignored."""
        names = {f.name for f in dataclasses.fields(cls)}
        known: dict[str, Any] = {k: v for k, v in body.items() if k in names}
        known["allow_clusters"] = tuple(known.get("allow_clusters", ()))
        return cls(**known)


def with_residency(engine: EngineSpec, tenants: Iterable[Tenant]) -> EngineSpec:
    """The engine with the tenants that must not be served there."""
    closed = tuple(sorted(t.name for t in tenants if not t.may_use(engine.cluster)))
    return dataclasses.replace(engine, closed_to=closed) if closed != engine.closed_to else engine
