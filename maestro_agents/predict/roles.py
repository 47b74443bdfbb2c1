"""Output length and service time from online statistics, per role: what is known before any model is trained.

A role's recent output lengths (a window), shrunk to its model's, shrunk to everything: an app that was never seen gets a
useful estimate from its first task on.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final

from maestro_agents.core import EngineSpec, Observation, Prediction, Status, Ticket
from maestro_agents.workflow import Workflows

WINDOW: Final = 200
SHRINK: Final = 3
"""Values of the level above that a role's own window is mixed with."""

MAX_ROLES: Final = 20_000
DEFAULT_OUTPUT_TOKENS: Final = (64, 200, 512)
"""What a stage may write while nothing was ever observed."""


@dataclass(slots=True)
class Window:
    """The latest values of one population, and its quantiles."""

    values: deque[int] = field(default_factory=lambda: deque[int](maxlen=WINDOW))

    def quantiles(self, above: tuple[float, ...], at: tuple[float, ...]) -> tuple[float, ...]:
        """Quantiles ``at`` of the window together with `SHRINK` values from the level ``above``."""
        pool = sorted([*self.values, *above])
        return tuple(pool[min(len(pool) - 1, math.ceil(q * len(pool)) - 1 if q > 0 else 0)] for q in at)

    def sample(self, above: tuple[float, ...]) -> tuple[float, ...]:
        """`SHRINK` values that stand for this level where it is the prior of the one below."""
        return self.quantiles(above, (0.2, 0.5, 0.9))


class RoleStatistics:
    """Fed by the observation log; asked by the scheduler for every waiting stage."""

    def __init__(self) -> None:
        self._roles: OrderedDict[str, Window] = OrderedDict()
        self._models: dict[str, Window] = {}
        self._changed: set[str] = set()
        self._cache: dict[str, tuple[float, float, float, float]] = {}

    def observe(self, o: Observation) -> None:
        """Take a finished stage."""
        if o.status is not Status.DONE or o.output_tokens <= 0:
            return
        key = f"{o.model}|{o.role}"
        self._roles.setdefault(key, Window()).values.append(o.output_tokens)
        self._roles.move_to_end(key)
        self._models.setdefault(o.model, Window()).values.append(o.output_tokens)
        self._changed.add(key)
        self._cache.pop(key, None)
        if len(self._roles) > MAX_ROLES:
            self._cache.pop(self._roles.popitem(last=False)[0], None)

    def _quantiles(self, role_key: str, model: str) -> tuple[float, float, float, float]:
        """Mean, p50, p90, p99 of a role's output tokens."""
        found = self._cache.get(role_key)
        if found is None:
            above = (
                self._models[model].sample(DEFAULT_OUTPUT_TOKENS) if model in self._models else DEFAULT_OUTPUT_TOKENS
            )
            window = self._roles.get(role_key, Window())
            p50, p90, p99 = window.quantiles(above, (0.5, 0.9, 0.99))
            pool = [*window.values, *above]
            found = (sum(pool) / len(pool), p50, p90, p99)
            if role_key in self._roles:
                self._cache[role_key] = found
        return found

    def predict(self, ticket: Ticket, engine: EngineSpec, workflows: Workflows) -> Prediction:
        """Predict a waiting stage; seconds are for ``engine``, unloaded."""
        mean, p50, p90, p99 = self._quantiles(ticket.role_key, ticket.model)
        if ticket.max_tokens is not None:
            mean, p50, p90, p99 = (min(x, ticket.max_tokens) for x in (mean, p50, p90, p99))
        window = self._roles.get(ticket.role_key)
        return Prediction(
            output_tokens_mean=mean,
            output_tokens_p50=p50,
            output_tokens_p90=p90,
            output_tokens_p99=p99,
            service_s=ticket.prompt_tokens * engine.prefill_s_per_token + mean * engine.decode_s_per_token,
            remaining_s=workflows.remaining_s(ticket),
            basis=f"role({len(window.values)})" if window else "prior",
        )

    def changed_p99(self) -> dict[str, float]:
        """p99 output tokens of the roles that changed since the last call: what the fast path reserves."""
        changed, self._changed = self._changed, set()
        return {key: self._quantiles(key, key.partition("|")[0])[3] for key in changed if key in self._roles}
