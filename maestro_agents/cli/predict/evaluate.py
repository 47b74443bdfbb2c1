"""`maestro predict eval`: every predictor trained on the same tasks, tested on the same others, scored side by side.

A predictor is a function ``fit(train, seed)`` of `PREDICTORS`, from `ours` or `baselines`. Figures are averaged over seeds, with each seed's own kept (``per_seed``).
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from maestro_agents.cli.predict import baselines, metrics
from maestro_agents.cli.predict.baselines import Fit, Fitted
from maestro_agents.errors import ConfigError
from maestro_agents.predict.traces import SHORT_TOKENS, Array, Call, Forecast, split_by_task

RIVALS: Final = ("app_role_median", "magnus_style", "magnus_plus", "lightgbm_paper", "single_phase")
"""Predictors that each other one's error is compared with, task by task."""

PACKAGES: Final = (
    "maestro-agents",
    "numpy",
    "scipy",
    "xgboost-cpu",
    "xgboost",
    "scikit-learn",
    "lightgbm",
    "wordllama",
)

Say = Callable[[], None]
"""Called after each step."""


def ours(name: str) -> Fit:
    """One of our own predictors. XGBoost is loaded when it is trained."""

    def fit(train: Sequence[Call], seed: int) -> Fitted:
        from maestro_agents.cli.predict import ours

        return ours.fit(name, train, seed)

    return fit


OURS: Final = ("single_phase", "ours", "ours_online", "ours_no_text", "ours_no_history", "ours_no_phase1")
PREDICTORS: dict[str, Fit] = {**baselines.BASELINES, **{name: ours(name) for name in OURS}}


@dataclass(frozen=True, kw_only=True)
class Split:
    """What is trained on and what is tested on."""

    seed: int
    train: Sequence[Call]
    test: Sequence[Call]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What every predictor said of a split's test calls."""

    split: Split
    truth: Array
    forecasts: dict[str, Forecast]
    #: Seconds of training and of forecasting.
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])


def chosen(only: Sequence[str]) -> tuple[list[str], str]:
    """The predictors that are asked for and can run, and a line about what cannot (empty: nothing)."""
    if wrong := sorted(set(only) - set(PREDICTORS)):
        raise ConfigError(f"--only {wrong[0]!r}: one of {', '.join(PREDICTORS)}")
    names = [name for name in PREDICTORS if not only or name in only]
    lacking = baselines.missing()
    out = [name for name in names if lacking and name in baselines.NEED_EXTRA]
    names = [name for name in names if name not in out]
    if not names:
        raise ConfigError(f"{', '.join(out)} need {', '.join(lacking)}: pip install 'maestro-agents[eval]'")
    line = f"{', '.join(out)} left out: {', '.join(lacking)} not installed (pip install 'maestro-agents[eval]')"
    return names, line if out else ""


def splits(calls: Sequence[Call], seeds: int, other: Sequence[Call] | None) -> Iterator[Split]:
    """Each seed's own split by task; with ``other``, all of ``calls`` against all of it."""
    for seed in range(seeds):
        train, test = (calls, other) if other is not None else split_by_task(calls, seed)
        if not train or not test:
            raise ConfigError("too few tasks to split: a trace needs at least three tasks of one app, or give --test")
        yield Split(seed=seed, train=train, test=test)


def score(split: Split, names: Iterable[str], say: Say) -> Scored:
    """Train and test each of ``names``."""
    forecasts: dict[str, Forecast] = {}
    seconds: dict[str, tuple[float, float]] = {}
    for name in names:
        began = time.perf_counter()
        fitted = PREDICTORS[name](split.train, split.seed)
        trained = time.perf_counter()
        forecasts[name] = fitted.forecast(split.test)
        seconds[name] = trained - began, time.perf_counter() - trained
        say()
    truth = baselines.outputs(split.test)
    return Scored(split=split, truth=truth, forecasts=forecasts, seconds=seconds)


# -- tables --------------------------------------------------------------------------------------------------------------
def tables(scored: Sequence[Scored]) -> dict[str, Any]:
    """All tables, ready for JSON."""
    found: dict[str, Any] = {
        "overall": _averaged([row for s in scored for row in _overall(s)], ("predictor",)),
        "apps": _averaged([r for s in scored for r in _grouped(s, lambda c: {"app": c.app})], ("app", "predictor")),
        "roles": _averaged(
            [r for s in scored for r in _grouped(s, lambda c: {"app": c.app, "role": c.role})],
            ("app", "role", "predictor"),
        ),
        "phase1": phase1(scored),
        "seeds": [s.split.seed for s in scored],
        "rows": {
            "train": [len(s.split.train) for s in scored],
            "test": [len(s.split.test) for s in scored],
            "test_tasks": [len({c.task_id for c in s.split.test}) for s in scored],
        },
        "seconds": {
            name: {"train": float(np.mean([s.seconds[name][0] for s in scored])),
                   "forecast": float(np.mean([s.seconds[name][1] for s in scored]))}
            for name in scored[0].forecasts
        },
        "point": "mae, tau and r2 are of the median p50; bias, rmse and r2_mean of the mean",
        "versions": _versions(),
    }  # fmt: skip
    known = {c.app for c in scored[0].split.train}
    for row in found["apps"]:
        row["seen"] = row["app"] in known
    if {c.app for c in scored[0].split.test} - known:
        for name, inside in (("overall_seen", True), ("overall_unseen", False)):
            parts = [_part(s, [(c.app in known) is inside for c in s.split.test]) for s in scored]
            found[name] = _averaged([row for s in parts if len(s.truth) for row in _overall(s)], ("predictor",))
    return found


def _part(s: Scored, keep: Sequence[bool]) -> Scored:
    mask = np.array(keep)
    test = [c for c, k in zip(s.split.test, keep, strict=True) if k]
    forecasts = {name: f.rows(mask) for name, f in s.forecasts.items()}
    return Scored(
        split=Split(seed=s.split.seed, train=s.split.train, test=test), truth=s.truth[mask], forecasts=forecasts
    )


def _overall(s: Scored) -> Iterator[dict[str, Any]]:
    """A row per predictor: figures, intervals, and how far its error is below the rivals'."""
    again = metrics.Resampler(s.split.test, s.split.seed)
    pooled = {name: again.pooled(np.abs(s.truth - f.p50)) for name, f in s.forecasts.items()}
    macro = {name: again.macro(np.abs(s.truth - f.p50)) for name, f in s.forecasts.items()}
    for name, f in s.forecasts.items():
        row: dict[str, Any] = {"predictor": name, "seed": s.split.seed, "rows": len(s.truth)}
        row |= metrics.figures(s.truth, f)
        row |= {
            "mae_interval": metrics.interval(pooled[name]),
            "mae_macro": float(macro[name][0]),
            "mae_macro_interval": metrics.interval(macro[name]),
            "coverage_p90_interval": metrics.interval(again.pooled((s.truth <= f.p90).astype(float))),
        }
        row["mae_below"] = {
            rival: {
                "share": float(1 - pooled[name][0] / pooled[rival][0]),
                "interval": metrics.interval(1 - pooled[name] / pooled[rival]),
            }
            for rival in RIVALS
            if rival in pooled and rival != name and pooled[rival].min() > 0
        }
        yield row


def _grouped(s: Scored, key: Callable[[Call], dict[str, str]]) -> Iterator[dict[str, Any]]:
    groups: defaultdict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
    for n, c in enumerate(s.split.test):
        groups[tuple(key(c).items())].append(n)
    for group, at in groups.items():
        index = np.array(at)
        for name, f in s.forecasts.items():
            row: dict[str, Any] = dict(group) | {"predictor": name, "seed": s.split.seed, "rows": len(at)}
            yield row | metrics.figures(s.truth[index], f.rows(index))


def phase1(scored: Sequence[Scored]) -> dict[str, Any]:
    """How well the first phase tells short answers, and what it gains in MAE."""
    found: dict[str, Any] = {"label": f"output_tokens <= {SHORT_TOKENS}"}
    if "sklearn" not in baselines.missing():
        rows = [
            {"predictor": name, "seed": s.split.seed}
            | metrics.classified((s.truth <= SHORT_TOKENS).astype(float), f.p_short)
            for s in scored
            for name, f in s.forecasts.items()
            if f.p_short is not None and np.isfinite(f.p_short).any()
        ]
        found["predictors"] = _averaged(rows, ("predictor",))
    mae = {
        name: float(np.mean([np.abs(s.truth - s.forecasts[name].p50).mean() for s in scored]))
        for name in ("ours", "ours_no_phase1")
        if name in scored[0].forecasts
    }
    if len(mae) == 2:
        found["mae_without"], found["mae_with"] = mae["ours_no_phase1"], mae["ours"]
        found["gain"] = 1 - mae["ours"] / mae["ours_no_phase1"]
    return found


def _averaged(rows: Sequence[dict[str, Any]], key: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row per key: every figure averaged over the seeds that have it."""
    groups: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in key)].append(row)
    found: list[dict[str, Any]] = []
    for values, group in groups.items():
        figures = {name: mean([row[name] for row in group]) for name in group[0] if name not in (*key, "seed")}
        each = [{name: v for name, v in row.items() if name not in key} for row in group]
        found.append(dict(zip(key, values, strict=True)) | figures | {"per_seed": each})
    return found


def mean(values: Sequence[Any]) -> Any:
    """Of numbers, or position by position of lists and mappings of numbers; None counts as absent."""
    there = [v for v in values if v is not None]
    if not there:
        return None
    if isinstance(there[0], dict):
        keys = cast("dict[str, Any]", there[0])
        return {name: mean([v.get(name) for v in there]) for name in keys}
    if isinstance(there[0], list):
        return [mean(column) for column in zip(*there, strict=True)]
    return float(np.mean(there))


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# -- files ---------------------------------------------------------------------------------------------------------------
def write_predictions(path: Path, scored: Sequence[Scored]) -> None:
    """One JSON line per test row and seed, no text: enough to score everything again."""
    with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as out:
        for s in scored:
            for n, c in enumerate(s.split.test):
                row: dict[str, Any] = {
                    "seed": s.split.seed,
                    "app": c.app,
                    "task_id": c.task_id,
                    "session_id": c.session_id,
                    "call_index": c.call_index,
                    "role": c.role,
                    "model": c.model,
                    "input_tokens": c.input_tokens,
                    "actual": c.output_tokens,
                }
                for name, f in s.forecasts.items():
                    said = {q: round(float(getattr(f, q)[n]), 3) for q in ("p50", "mean", "p90", "p99")}
                    if f.p_short is not None and np.isfinite(f.p_short[n]):
                        said["p_short"] = round(float(f.p_short[n]), 5)
                    row[name] = said
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
