"""The predictor as it would have been: trained on some recorded calls, asked about others.

Protocols: `trained`, then frozen, each test call sees its own run's past and nothing else of the test; `online`, where sessions
end one after another and each finished one teaches, as in a live scheduler; `cold_start`, a model that never saw the app, then
some observed tasks of it, then frozen.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from maestro_agents.predict.features import FEATURE_NAMES, trace_numbers
from maestro_agents.predict.learn import Predictor
from maestro_agents.predict.length import Example, LengthModel, Progress, train
from maestro_agents.predict.roles import Estimate
from maestro_agents.predict.traces import SHORT_TOKENS, Call, Forecast

RATIO_RANGE: Final = (0.5, 2.0)
"""Estimates of a prompt's tokens are taken to be wrong by no more than this factor."""

_VISIT: Final = FEATURE_NAMES.index("visit")


def sessions(calls: Iterable[Call]) -> list[list[Call]]:
    """The calls of each session, in their order."""
    found: defaultdict[tuple[str, str], list[Call]] = defaultdict(list)
    for c in calls:
        found[c.app, c.session_id].append(c)
    return [sorted(s, key=lambda c: c.call_index) for s in found.values()]


def examples_of(calls: Sequence[Call], *, seed: int = 0, ratios: Sequence[float] = ()) -> list[Example]:
    """Recorded calls as a live client would have told them, in the order of ``calls``.

    The prompt's tokens are the recorded count times an error drawn from ``ratios`` (estimate / truth), one a session and a
    little more a call, since a live client only estimates them.
    """
    rng = random.Random(seed)
    found: dict[tuple[str, str, int], Example] = {}
    for session in sessions(calls):
        ratio = rng.choice(ratios) if ratios else 1.0
        ratio = min(max(ratio, RATIO_RANGE[0]), RATIO_RANGE[1])
        tokens = [
            max(1, round(c.input_tokens * ratio * rng.uniform(0.97, 1.03))) if ratios else c.input_tokens
            for c in session
        ]
        for call, told in zip(session, trace_numbers(session, tokens), strict=True):
            found[call.app, call.session_id, call.call_index] = Example(
                model=call.model,
                role=f"{call.app}:{call.role}",
                visit=int(told.features[_VISIT]),
                prompt_tokens=told.prompt_tokens,
                features=told.features,
                sketch=told.sketch,
                output_tokens=call.output_tokens,
                short=call.output_tokens <= SHORT_TOKENS,
                group=call.task_id,
                session=f"{call.app}|{call.session_id}",
            )
    return [found[c.app, c.session_id, c.call_index] for c in calls]


def trained(
    examples: Sequence[Example], *, seed: int, variant: str = "ours", progress: Progress | None = None
) -> tuple[LengthModel, Predictor]:
    """A model of these examples, and a predictor whose statistics have seen them, in a random order of sessions."""
    model = train(examples, seed=seed, variant=variant, progress=progress)
    predictor = Predictor(model)
    for session in _shuffled(examples, seed):
        for e in session:
            predictor.statistics.add(e, e.output_tokens)
    return model, predictor


def online(predictor: Predictor, asked: Sequence[Example], *, seed: int) -> Forecast:
    """Sessions are asked about one after another, in a random order, and teach when they have ended."""
    said: dict[int, Estimate] = {}
    for session in _shuffled(asked, seed):
        said |= dict(zip(map(id, session), predictor.estimate(session), strict=True))
        predictor.teach([(e, e.output_tokens) for e in session])
    return as_forecast([said[id(e)] for e in asked])


def held_out(predictor: Predictor, examples: Sequence[Example]) -> list[tuple[list[int], Forecast]]:
    """For each fold of the examples that its model was just trained on: their places, and what is said of them by models that
    never saw their tasks. Means are not told.
    """
    assert predictor.model is not None
    assert predictor.model.held_out is not None
    fold, raw = predictor.model.held_out
    said = as_forecast(predictor.estimate(examples, raw))
    return [(at, said.rows(at)) for k in sorted(set(fold.tolist())) if (at := np.flatnonzero(fold == k).tolist())]


def cold_start(model: LengthModel, observed: Sequence[Example], asked: Sequence[Example]) -> Forecast:
    """What a model that never saw an app says of its calls after some observed ones; of none: the model alone."""
    predictor = Predictor(model)
    for session in _in_order(observed):
        predictor.teach([(e, e.output_tokens) for e in session])
    return as_forecast(predictor.estimate(asked))


def as_forecast(estimates: Sequence[Estimate]) -> Forecast:
    """As arrays."""
    columns = {
        name: np.array([getattr(e, name) for e in estimates]) for name in ("p50", "mean", "p90", "p99", "short_p")
    }
    return Forecast(
        p50=columns["p50"], mean=columns["mean"], p90=columns["p90"], p99=columns["p99"], p_short=columns["short_p"]
    )


def _in_order(examples: Sequence[Example]) -> list[list[Example]]:
    found: defaultdict[str, list[Example]] = defaultdict(list)
    for e in examples:
        found[e.session].append(e)
    return list(found.values())


def _shuffled(examples: Sequence[Example], seed: int) -> list[list[Example]]:
    found = _in_order(examples)
    random.Random(seed).shuffle(found)
    return found
