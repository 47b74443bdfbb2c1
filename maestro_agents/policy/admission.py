"""Who may start now: a free slot, and the KV reservation fits into what is free. Engines' own queues stay empty."""

from __future__ import annotations

from collections.abc import Callable

from maestro_agents.core import EngineState, Prediction, Ticket, kv_need_bytes

Reserve = Callable[[Ticket, Prediction], float]
"""(ticket, prediction) -> output tokens of each choice to promise KV memory for."""


def reservation_bytes(ticket: Ticket, output_tokens: float, engine: EngineState) -> int:
    """KV bytes to promise: prompt + ``output_tokens``. All of the engine's where only that guess is larger than it has."""
    spec = engine.spec
    need = kv_need_bytes(ticket, output_tokens, spec)
    return max(min(need, spec.kv_bytes), kv_need_bytes(ticket, 1, spec)) if spec.kv_bytes else need


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
