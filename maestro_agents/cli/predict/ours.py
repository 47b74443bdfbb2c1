"""Our own predictor, and what it is without its parts, as the evaluation asks for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Final

from maestro_agents.predict import backtest
from maestro_agents.predict.features import estimate_ratios
from maestro_agents.predict.learn import Predictor
from maestro_agents.predict.length import Example
from maestro_agents.predict.traces import Call, Forecast


class Training:
    """The training calls that all variants share, and calls as a live client would have told them: each made once."""

    def __init__(self, calls: Sequence[Call], seed: int) -> None:
        self.calls = calls
        self.seed = seed
        self.variants: dict[str, Ours] = {}
        self._ratios = estimate_ratios(calls)
        self._told: dict[int, tuple[Sequence[Call], list[Example]]] = {}

    def known(self) -> list[Example]:
        """The training calls themselves."""
        return self._examples(self.calls, self.seed)

    def asked(self, calls: Sequence[Call]) -> list[Example]:
        """Calls that are asked about."""
        return self._examples(calls, self.seed + 1)

    def observed(self, calls: Sequence[Call]) -> list[Example]:
        """Calls that end before others are asked about."""
        return self._examples(calls, self.seed + 2)

    def _examples(self, calls: Sequence[Call], seed: int) -> list[Example]:
        """Tokens in are estimated, with errors drawn by ``seed``; its latest calls are remembered."""
        if seed not in self._told or self._told[seed][0] is not calls:
            self._told[seed] = calls, backtest.examples_of(calls, seed=seed, ratios=self._ratios)
        return self._told[seed][1]


class Ours:
    """Trained and then frozen: a test call sees its own run's past, and nothing else of the test."""

    def __init__(self, training: Training, variant: str) -> None:
        self.training = training
        self.model, self.predictor = backtest.trained(training.known(), seed=training.seed, variant=variant)

    def forecast(self, calls: Sequence[Call]) -> Forecast:
        return backtest.as_forecast(self.predictor.estimate(self.training.asked(calls)))

    def after(self, observed: Sequence[Call]) -> Shown:
        """The model, in an app that it knows nothing of but these calls."""
        return Shown(self, observed)

    def held_out(self) -> list[tuple[list[Call], Forecast]]:
        """What models that never saw their tasks say of the training calls, fold by fold."""
        folds = backtest.held_out(self.predictor, self.training.known())
        return [([self.training.calls[i] for i in at], f) for at, f in folds]


class Shown:
    """The model with statistics of some observed calls only; of none: the model alone."""

    def __init__(self, ours: Ours, observed: Sequence[Call]) -> None:
        self._ours = ours
        self._observed = ours.training.observed(observed)

    def forecast(self, calls: Sequence[Call]) -> Forecast:
        return backtest.cold_start(self._ours.model, self._observed, self._ours.training.asked(calls))


class Online:
    """As in a live scheduler: sessions end one after another, in a random order, and each finished one teaches."""

    def __init__(self, ours: Ours) -> None:
        self._ours = ours

    def forecast(self, calls: Sequence[Call]) -> Forecast:
        predictor = Predictor(self._ours.model)
        predictor.statistics = copy.deepcopy(self._ours.predictor.statistics)
        training = self._ours.training
        return backtest.online(predictor, training.asked(calls), seed=training.seed)


VARIANTS: Final = {
    "single_phase": "single_phase",
    "ours": "ours",
    "ours_online": "ours",
    "ours_no_text": "no_text",
    "ours_no_history": "no_history",
    "ours_no_phase1": "no_phase1",
}
"""Name in the tables -> variant of `maestro_agents.predict.length.train`."""

_latest: list[Training] = []
"""The latest training: all variants are fitted on one before the next."""


def fit(name: str, train: Sequence[Call], seed: int) -> Ours | Online:
    """Train one of `VARIANTS`; ``ours`` and ``ours_online`` are one training."""
    if not _is_latest(train, seed):
        _latest[:] = [Training(train, seed)]
    (training,) = _latest
    variant = VARIANTS[name]
    if variant not in training.variants:
        training.variants[variant] = Ours(training, variant)
    found = training.variants[variant]
    return Online(found) if name == "ours_online" else found


def held_out(train: Sequence[Call], seed: int) -> list[tuple[list[Call], Forecast]] | None:
    """What ``ours`` says of its own training calls, held out; None where it is not of the latest training."""
    found = _latest[0].variants.get("ours") if _is_latest(train, seed) else None
    return found.held_out() if found else None


def _is_latest(train: Sequence[Call], seed: int) -> bool:
    return bool(_latest) and _latest[0].calls is train and _latest[0].seed == seed
