"""Where to: the engine with the fewest predicted seconds to completion. A sum and an argmin; every part has a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from maestro_agents.core import EngineState, Prediction, Ticket

Cost = Callable[[Ticket, Prediction, EngineState, int], Mapping[str, float]]
"""(ticket, prediction, engine, prompt tokens in its prefix cache) -> cost there by part; the smallest sum wins."""


def cost(ticket: Ticket, prediction: Prediction, engine: EngineState, cached_tokens: int = 0) -> Mapping[str, float]:
    """Predicted seconds to completion on an engine, by part. The parts add up; `seconds` adds them.

    ``wait``: the engine's own queue, as far as it reports one beyond what we granted, served at its decode speed.
    ``prefill``: of the prompt less ``cached_tokens``, those that the engine is expected to have in its prefix cache.
    ``decode``: at the batch that it would join, since a batch shares the engine's step.
    """
    spec = engine.spec
    prefill = engine.prefill_s_per_token or spec.prefill_s_per_token
    decode = engine.decode_s_per_token or spec.decode_s_per_token
    beside = engine.beside_s_per_token if engine.decode_s_per_token else decode / (2.0 * spec.slots)
    foreign = max(0, engine.waiting) / spec.slots
    tokens = prediction.output_tokens_mean
    return {
        "network_s": engine.rtt_s(ticket.site),
        "wait_s": foreign * tokens * decode,
        "prefill_s": max(0, ticket.prompt_tokens - cached_tokens) * prefill,
        "decode_s": tokens * (decode + beside * engine.reserved_slots),
    }


def seconds(parts: Mapping[str, float]) -> float:
    """What an engine's cost comes to."""
    return sum(parts.values())


# -- what ours is compared with --------------------------------------------------------------------------------------------
def round_robin(
    ticket: Ticket, prediction: Prediction, engine: EngineState, cached_tokens: int = 0
) -> Mapping[str, float]:
    """Each in turn: the engine that was granted the fewest stages so far."""
    del ticket, prediction, cached_tokens
    return {"grants": float(engine.grants)}


def least_loaded(
    ticket: Ticket, prediction: Prediction, engine: EngineState, cached_tokens: int = 0
) -> Mapping[str, float]:
    """The engine with the smallest share of its places taken."""
    del ticket, prediction, cached_tokens
    return {"load": engine.reserved_slots / engine.spec.slots}


def nearest(ticket: Ticket, prediction: Prediction, engine: EngineState, cached_tokens: int = 0) -> Mapping[str, float]:
    """The nearest engine that has room, the least loaded of those as near."""
    del prediction, cached_tokens
    return {"network_s": engine.rtt_s(ticket.site), "load": 1e-6 * engine.reserved_slots / engine.spec.slots}
