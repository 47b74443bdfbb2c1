"""Training on the pool's own traffic: what to train on, and whether what came of it is better. In a process of its own.

``python -m maestro_agents.predict.trainer`` is that process (`train_apart` starts it): rows on stdin, a verdict and a model on
stdout, low priority, never longer alive than who started it. Nothing of a prompt is in any of it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import sys
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from maestro_agents.core import Observation
from maestro_agents.errors import ModelUnusable
from maestro_agents.predict.features import FEATURE_NAMES, usable
from maestro_agents.predict.learn import Predictor
from maestro_agents.predict.length import MIN_ROWS, Example, LengthModel, train
from maestro_agents.predict.traces import SHORT_TOKENS

WINDOW_ROWS: Final = 20_000
"""Finished stages that are kept to train on, some 1.5 KB each."""

TEST_SHARE: Final = 0.2
"""Part of the window, its newest runs, that a candidate is tested on and not trained on."""

BETTER: Final = 0.02
"""A candidate's error must be so much below that of the model in use, and below that of the running median."""

COVERAGE: Final = (0.85, 0.95)
"""Share of the newest answers that must stay below a candidate's p90. More is well by two standard errors of such a share,
since it costs memory alone, and where the statistics' own p90 has more.
"""

NICE: Final = 10
BATCH: Final = 50
"""Stages that are predicted together in a test, before the first of them has taught."""

_PROMPT_TOKENS: Final = FEATURE_NAMES.index("prompt_tokens")
_TOOLS: Final = FEATURE_NAMES.index("tools")


# -- what is trained on --------------------------------------------------------------------------------------------------
def example_of(o: Observation) -> Example | None:
    """A finished stage as the trainer sees it; None where its features are none that this version understands.

    Its prompt's tokens are the app's estimate, as they will be when a stage waits: the engine's count comes too late.
    """
    if not usable(o.features):
        return None
    tokens = o.choice_tokens
    return Example(
        model=o.model,
        role=o.role,
        visit=o.visit,
        prompt_tokens=round(o.features[_PROMPT_TOKENS]),
        features=o.features,
        sketch=o.sketch,
        output_tokens=tokens,
        short=o.tool_calls > 0 if o.features[_TOOLS] > 0 else tokens <= SHORT_TOKENS,
        group=o.run_id or o.stage_id,
        session=o.run_id or o.stage_id,
    )


class Row(NamedTuple):
    """An `Example` and when it ended, packed."""

    model: str
    role: str
    visit: int
    sketch: str
    output_tokens: int
    short: bool
    session: str
    ended_at_s: float
    #: Doubles, in the order of `features.FEATURES`.
    features: bytes

    @classmethod
    def of(cls, e: Example, ended_at_s: float) -> Row:
        packed = array("d", e.features).tobytes()
        return cls(e.model, e.role, e.visit, e.sketch, e.output_tokens, e.short, e.session, ended_at_s, packed)


class Rows:
    """The latest finished stages, at most ``size``. Each role on its model gets an equal share, and what others leave of theirs."""

    def __init__(self, size: int = WINDOW_ROWS) -> None:
        self.size = size
        self._roles: OrderedDict[str, deque[Row]] = OrderedDict()
        self._n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def roles(self) -> int:
        """How many roles have rows."""
        return len(self._roles)

    def add(self, row: Row) -> None:
        """Take the latest."""
        key = f"{row.model}|{row.role}"
        self._roles.setdefault(key, deque()).append(row)
        self._roles.move_to_end(key)
        self._n += 1
        if self._n > 1.05 * self.size:  # not at each one: to find the largest role takes a look at all
            self.trim()

    def trim(self) -> None:
        """Forget the oldest of the largest roles; where there are more roles than places, the roles that rested longest."""
        share = equal_share([len(rows) for rows in self._roles.values()], self.size)
        for rows in self._roles.values():
            while len(rows) > max(1, share):
                rows.popleft()
        while len(self._roles) > self.size:
            self._roles.popitem(last=False)
        self._n = sum(len(rows) for rows in self._roles.values())

    def after(self, at_s: float) -> int:
        """How many ended later than this."""
        return sum(row.ended_at_s > at_s for rows in self._roles.values() for row in rows)

    def latest(self) -> list[Row]:
        """All of them, in the order in which they ended."""
        self.trim()
        return sorted((row for rows in self._roles.values() for row in rows), key=lambda row: row.ended_at_s)


def equal_share(sizes: Sequence[int], total: int) -> int:
    """The largest number such that ``sizes``, none above it, add up to no more than ``total``."""
    left = total
    for i, size in enumerate(ordered := sorted(sizes)):
        if size * (len(ordered) - i) > left:
            return left // (len(ordered) - i)
        left -= size
    return total


# -- whether a candidate is better ---------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a candidate did on the newest part of the window, beside what is in use. Errors are means, in tokens."""

    rows: int
    tested: int
    mae: float
    #: None where no model is in use.
    current_mae: float | None
    median_mae: float
    covered_p90: float
    #: The share that stayed below the p90 of statistics alone.
    median_covered_p90: float
    #: Memory is reserved by its p90, which must hold what it promises.
    reserves: bool = True
    seconds: float = 0.0

    @property
    def against(self) -> str:
        """Why it is not published, "" where it is."""
        bar = min(self.median_mae, self.median_mae if self.current_mae is None else self.current_mae)
        if not self.mae <= (1 - BETTER) * bar:
            other = "the running median" if bar == self.median_mae else "the model in use"
            return f"its error of {self.mae:.1f} tokens is not {BETTER:.0%} below that of {other} ({bar:.1f})"
        if not self.reserves:
            return ""
        chance = 2 * math.sqrt(0.9 * 0.1 / max(1, self.tested))
        low, high = COVERAGE[0], max(COVERAGE[1] + chance, self.median_covered_p90)
        if not low <= self.covered_p90 <= high:
            return f"{self.covered_p90:.1%} of the answers stayed below its p90, not {low:.0%} to {high:.0%}"
        return ""

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "against": self.against}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the process is given. ``current``: file of the model in use, empty for none."""

    rows: Sequence[Row]
    current: bytes = b""
    version: str
    #: ISO 8601.
    trained_at: str
    #: See `Verdict`.
    reserves: bool = True
    seed: int = 0


def parted(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(older, newest): the runs that ended last, `TEST_SHARE` of the rows, are the newest; no run is in both."""
    ends: dict[str, float] = {}
    counts: dict[str, int] = {}
    for row in rows:
        ends[row.session] = row.ended_at_s
        counts[row.session] = counts.get(row.session, 0) + 1
    newest: set[str] = set()
    n = 0
    for session in sorted(ends, key=lambda s: -ends[s]):
        if n + counts[session] > TEST_SHARE * len(rows) and newest:
            break
        newest.add(session)
        n += counts[session]
    return [r for r in rows if r.session not in newest], [r for r in rows if r.session in newest]


def judged(
    candidate: LengthModel,
    current: LengthModel | None,
    older: Sequence[Row],
    newest: Sequence[Row],
    *,
    reserves: bool = True,
) -> Verdict:
    """Let a candidate that was trained on the older rows, and the model in use, live through the newest."""
    ours = Predictor(candidate)
    for e in map(example, older):
        ours.statistics.add(e, e.output_tokens)
    theirs: Predictor | None = None
    if current is not None:
        theirs = Predictor(current)
        until_s = known_until_s(current)
        for row in older:
            if row.ended_at_s <= until_s:
                theirs.statistics.add(example(row), row.output_tokens)
        _live(theirs, [row for row in older if row.ended_at_s > until_s])
    wrong, covered, median, median_covered = _live(ours, newest)
    return Verdict(
        rows=len(older) + len(newest),
        tested=len(newest),
        mae=wrong,
        current_mae=None if theirs is None else _live(theirs, newest)[0],
        median_mae=median,
        covered_p90=covered,
        median_covered_p90=median_covered,
        reserves=reserves,
    )


def _live(predictor: Predictor, rows: Sequence[Row]) -> tuple[float, float, float, float]:
    """Predict rows, then learn from them, some at a time. (MAE, share below p90) of the predictor, then of its statistics."""
    found = np.zeros((max(1, len(rows)), 4))
    end = 0
    while end < len(rows):
        start, end = end, min(end + BATCH, len(rows))
        while end < len(rows) and rows[end].ended_at_s == rows[end - 1].ended_at_s:
            end += 1  # they became known together: all calls of a run, where it is asked what runs still write
        batch = [example(row) for row in rows[start:end]]
        for i, (e, said) in enumerate(zip(batch, predictor.estimate(batch), strict=True), start):
            alone = predictor.statistics.lengths(e)
            y = e.output_tokens
            found[i] = abs(said.p50 - y), y <= said.p90, abs(alone.p50 - y), y <= alone.p90
        predictor.teach([(e, e.output_tokens) for e in batch])
    mae, covered, median, median_covered = (float(x) for x in found.mean(axis=0))
    return mae, covered, median, median_covered


def example(row: Row) -> Example:
    """The row unpacked."""
    features = tuple(array("d", row.features))
    return Example(
        model=row.model,
        role=row.role,
        visit=row.visit,
        prompt_tokens=round(features[_PROMPT_TOKENS]) if features else 0,
        features=features,
        sketch=row.sketch,
        output_tokens=row.output_tokens,
        short=row.short,
        group=row.session,
        session=row.session,
    )


def known_until_s(model: LengthModel | None) -> float:
    """The end of the latest stage of this pool that a model was trained on; what came before says nothing of its errors."""
    return 0.0 if model is None else float(model.card.metrics.get("known_until_s", 0.0))


def fitted(job: Job, progress: Any = None) -> tuple[Verdict, bytes]:
    """Train on the older part, judge by the newest; where that is well, train again on all of it. Empty where it is not."""
    began_s = time.monotonic()
    older, newest = parted(job.rows)
    if min(len(older), len(newest)) < MIN_ROWS:
        raise ModelUnusable(
            f"{len(job.rows)} finished stages are too few: {MIN_ROWS} to train on, {MIN_ROWS} to test on"
        )
    candidate = train([example(r) for r in older], seed=job.seed, progress=progress)
    current = LengthModel.decode(job.current) if job.current else None
    verdict = judged(candidate, current, older, newest, reserves=job.reserves)
    data = b""
    if not verdict.against:
        model = train(
            [example(r) for r in job.rows],
            seed=job.seed,
            data="this pool's own traffic",
            version=job.version,
            trained_at=job.trained_at,
            progress=progress,
        )
        metrics = {
            **model.card.metrics,
            "known_until_s": max(r.ended_at_s for r in job.rows),
            "test_mae_tokens": verdict.mae,
            "test_median_mae_tokens": verdict.median_mae,
            "test_covered_p90": verdict.covered_p90,
        }
        model.card = dataclasses.replace(model.card, metrics=metrics)
        data = model.encode()
    return dataclasses.replace(verdict, seconds=time.monotonic() - began_s), data


# -- the process ---------------------------------------------------------------------------------------------------------
async def train_apart(job: Job) -> tuple[Verdict, bytes]:
    """`fitted` in a process of low priority. Raises `ModelUnusable` where it fails. Cancelled, the process ends too."""
    asked = await asyncio.to_thread(_packed, job)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "maestro_agents.predict.trainer"), stdin=pipe, stdout=pipe, stderr=pipe
    )
    try:
        out, errors = await process.communicate(asked)
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        words = errors.decode(errors="replace").strip().splitlines() or [f"status {process.returncode}"]
        raise ModelUnusable(f"training in the background failed: {words[-1]}")
    head, _, data = out.partition(b"\n")
    told: dict[str, Any] = json.loads(head)
    del told["against"]
    return Verdict(**told), data


def _packed(job: Job) -> bytes:
    head = {"version": job.version, "trained_at": job.trained_at, "reserves": job.reserves, "seed": job.seed}
    body = {**head, "rows": [row[:-1] for row in job.rows]}
    return b"".join([json.dumps(body).encode(), b"\n", *(row.features for row in job.rows), job.current])


def _unpacked(asked: bytes) -> Job:
    head, _, rest = asked.partition(b"\n")
    told: dict[str, Any] = json.loads(head)
    rows: list[list[Any]] = told.pop("rows")
    size = 8 * len(FEATURE_NAMES)
    packed = [Row._make([*row, rest[i * size : (i + 1) * size]]) for i, row in enumerate(rows)]
    return Job(rows=packed, current=rest[size * len(rows) :], **told)


def main() -> None:
    """The process: a job on stdin, the verdict (one line of JSON) and the model's file on stdout."""
    os.nice(NICE)
    owner = os.getppid()

    def alive(_what: str, _share: float) -> None:
        if os.getppid() != owner:
            sys.exit("who asked for this is gone")

    verdict, data = fitted(_unpacked(sys.stdin.buffer.read()), alive)
    sys.stdout.buffer.write(json.dumps(verdict.to_json()).encode() + b"\n" + data)


if __name__ == "__main__":
    main()
