"""Who may start now: a free slot, and the KV reservation fits into what is free. Engines' own queues stay empty."""

from __future__ import annotations

from maestro_agents.core import EngineState, Prediction, Ticket, kv_need_bytes


def reservation_bytes(ticket: Ticket, prediction: Prediction, engine: EngineState) -> int:
    """KV bytes to promise: prompt + p90 of the output (the fast path, which cannot wait, takes the p99)."""
    return kv_need_bytes(ticket, prediction.output_tokens_p90, engine.spec)


def fits(ticket: Ticket, need_bytes: int, engine: EngineState) -> bool:
    """A nested stage always fits: its parent holds a slot until it has run."""
    return ticket.nested or (engine.free_slots > 0 and need_bytes <= engine.free_kv_bytes)


def could_ever_fit(need_bytes: int, engine: EngineState) -> bool:
    """The stage would fit on the engine if it were empty."""
    return engine.spec.kv_bytes == 0 or need_bytes <= engine.spec.kv_bytes
