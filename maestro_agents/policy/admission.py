"""Who may start now: a free slot, and the KV reservation fits into what is free. Engines' own queues stay empty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from maestro_agents.core import EngineState, Prediction, Ticket, kv_need_bytes

Reserve = Callable[[Ticket, Prediction], float]
"""(ticket, prediction) -> output tokens of each choice to promise KV memory for."""


RETURN_SLOTS: Final = 2
"""Slots that are open at first on an engine that was dead and answers again."""

RETURN_DOUBLES_S: Final = 1.0
"""Seconds in which these double, until all are open."""


def open_slots(slots: int, back_s: float) -> int:
    """Of an engine's slots, those that are open once it has answered again for ``back_s`` seconds.

    All that waited for it would go there at once: on cold caches, to a machine that has only just come up, or to one that
    falls over again with everything it was given.
    """
    doublings = min(32, int(max(0.0, back_s) / RETURN_DOUBLES_S))
    return min(slots, RETURN_SLOTS << doublings)


def reservation_bytes(ticket: Ticket, output_tokens: float, engine: EngineState, most_bytes: int = 0) -> int:
    """KV bytes to promise: prompt + ``output_tokens``. All of the engine's, or of its tenant's (``most_bytes``, 0: no limit), where
    only that guess is larger than that.
    """
    spec = engine.spec
    need = kv_need_bytes(ticket, output_tokens, spec)
    bounds = [bound for bound in (spec.kv_bytes, most_bytes) if bound]
    return max(min(need, *bounds), kv_need_bytes(ticket, 1, spec)) if bounds else need


def reserved_output_tokens(ticket: Ticket, prediction: Prediction) -> float:
    """Output tokens to promise KV memory for: the p50 of a stream, whose reservation grows as it is outgrown, else the p99.

    The fast path cannot ask the predictor, and takes the role's p99.
    """
    return prediction.output_tokens_p50 if ticket.streams else prediction.output_tokens_p99


def fits(ticket: Ticket, need_bytes: int, engine: EngineState) -> bool:
    """A nested stage always fits: its parent holds a slot until it has run."""
    return ticket.nested or (engine.free_slots > 0 and need_bytes <= engine.free_kv_bytes)


def could_ever_fit(need_bytes: int, engine: EngineState) -> bool:
    """The stage would fit on the engine if it were empty."""
    return engine.spec.kv_bytes == 0 or need_bytes <= engine.spec.kv_bytes


def cap(ticket: Ticket, prediction: Prediction) -> float:
    """A baseline: all that the caller allows, ``max_tokens``; the p99 where it allows anything."""
    return prediction.output_tokens_p99 if ticket.max_tokens is None else ticket.max_tokens
