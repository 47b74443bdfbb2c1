"""Recorded LLM calls: reading a trace file, and splitting it so that no task is on both sides.

A trace is JSON lines, gzipped or plain, one call a line. Asked of every line: ``app, task_id, session_id`` (one run of
one task), ``call_index``, ``role``, ``model``, ``input_tokens``, ``output_tokens``. Used where it is there: ``prev_role``,
``system_prompt`` with its ``system_prompt_hash``, ``input_text``, ``token_source``, ``parents``, ``ts_start``, ``ts_end``.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from maestro_agents.errors import ConfigError

Array = npt.NDArray[np.float64]

PROMPTS: Final = ("system_prompts.jsonl.gz", "system_prompts.jsonl")
"""Files beside a trace that hold ``{hash, text}``: whole system prompts, where the trace has only their beginning."""

_TEXTS: Final = ("app", "task_id", "session_id", "role", "model")
_COUNTS: Final = ("call_index", "input_tokens", "output_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One LLM call of a trace. Texts may be empty."""

    app: str
    task_id: str
    #: One run of one task.
    session_id: str
    #: Its place in the session, from 0.
    call_index: int
    role: str
    model: str
    input_tokens: int
    output_tokens: int
    prev_role: str | None = None
    #: Whole where the file of system prompts knows it, else its beginning.
    system_prompt: str = ""
    system_prompt_hash: str = ""
    #: The last message.
    input_text: str = ""
    #: ``usage``: the provider's count. Else how it was counted.
    token_source: str = ""
    #: Call indexes that this call waited for; None where unknown.
    parents: tuple[int, ...] | None = None
    #: Epoch seconds, None where not recorded.
    ts_start: float | None = None
    ts_end: float | None = None

    @property
    def seconds(self) -> float | None:
        """How long it took, None where its trace does not say (or says nonsense)."""
        if self.ts_start is None or self.ts_end is None or self.ts_end <= self.ts_start:
            return None
        return self.ts_end - self.ts_start


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a predictor says of some calls' output tokens, one entry per call."""

    #: The median: the point estimate that absolute errors are measured on.
    p50: Array
    mean: Array
    p90: Array
    p99: Array
    #: Probability that the answer is short (`SHORT_TOKENS`), where the predictor has one.
    p_short: Array | None = None
    #: Further quantiles by level (say 0.25 or 0.995), where the predictor has them.
    more: Mapping[float, Array] | None = None

    def rows(self, keep: Any) -> Forecast:
        """Of some of its calls: a mask, or their places."""
        return Forecast(
            p50=self.p50[keep],
            mean=self.mean[keep],
            p90=self.p90[keep],
            p99=self.p99[keep],
            p_short=None if self.p_short is None else self.p_short[keep],
            more=None if self.more is None else {level: q[keep] for level, q in self.more.items()},
        )


SHORT_TOKENS: Final = 32
"""An answer of at most so many tokens is short: traces carry no tool-call flag, and this stands for it."""


def read_calls(path: Path) -> list[Call]:
    """Read a trace: sessions in the order in which they begin, each ordered by ``call_index``.

    Raises `ConfigError` that names file, line and what to do where the file is missing, empty or no trace.
    """
    prompts: dict[str, str] = {}
    for name in PROMPTS:
        beside = path.with_name(name)
        if beside.is_file() and beside != path:
            prompts = {str(d.get("hash")): str(d.get("text") or "") for _, d in _objects(beside)}
            break
    sessions: defaultdict[tuple[str, str], list[Call]] = defaultdict(list)
    for where, fields in _objects(path):
        call = _call(fields, prompts, where)
        sessions[call.app, call.session_id].append(call)
    if not sessions:
        raise ConfigError(f"{path} holds no calls: give a trace with one JSON object a line")
    return [call for session in sessions.values() for call in sorted(session, key=lambda c: c.call_index)]


def split_by_task(calls: Sequence[Call], seed: int, test_share: float = 0.2) -> tuple[list[Call], list[Call]]:
    """Split into training and test by ``task_id``, the same share of the tasks of each app.

    A task that several apps solve (tau and tau2, both versions of Moatless) is on one side in all of them. An app with a
    single task is trained on.
    """
    test = _drawn(calls, seed, test_share)
    return [c for c in calls if c.task_id not in test], [c for c in calls if c.task_id in test]


def folds_by_task(calls: Sequence[Call], k: int, seed: int) -> list[int]:
    """Give every call a fold of 0 to ``k - 1``, the same for all calls of a task, balanced in each app."""
    fold: dict[str, int] = {}
    at = 0
    for group in _groups(calls, seed):
        for task in group:  # one round through all groups: small apps do not all land in fold 0
            fold[task] = at % k
            at += 1
    return [fold[c.task_id] for c in calls]


def _groups(calls: Sequence[Call], seed: int) -> list[list[str]]:
    """Shuffled tasks, grouped by the set of apps that solve them."""
    apps: defaultdict[str, set[str]] = defaultdict(set)
    for c in calls:
        apps[c.task_id].add(c.app)
    groups: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for task in sorted(apps):
        groups[tuple(sorted(apps[task]))].append(task)
    rng = random.Random(seed)
    for _, tasks in sorted(groups.items()):
        rng.shuffle(tasks)
    return [tasks for _, tasks in sorted(groups.items())]


def _drawn(calls: Sequence[Call], seed: int, share: float) -> set[str]:
    return {task for group in _groups(calls, seed) for task in group[: round(share * len(group))]}


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object and where it stands. Gzip is told by the file's first bytes, not its name."""
    number = 0
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt", encoding="utf-8") if zipped else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    fields: Any = json.loads(line)
                except ValueError as e:
                    raise ConfigError(f"{where} is no JSON ({e}): remove the line or write the file again") from e
                if not isinstance(fields, dict):
                    raise ConfigError(f"{where} is no JSON object: a trace has one call a line")
                yield where, cast("dict[str, Any]", fields)
    except OSError as e:
        reason = f"after line {number}: {e}" if isinstance(e, gzip.BadGzipFile) else (e.strerror or str(e))
        raise ConfigError(f"{path}: {reason}. Name a trace of JSON lines, plain or gzipped") from e
    except (EOFError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: broken after line {number} ({e}): copy or write the file again") from e


def _call(fields: Mapping[str, Any], prompts: Mapping[str, str], where: str) -> Call:
    for name in (*_TEXTS, *_COUNTS):
        if fields.get(name) is None:
            raise ConfigError(f"{where} has no {name!r}: every call needs {', '.join((*_TEXTS, *_COUNTS))}")
    for name in _COUNTS:
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(
                f"{where}: {name} is {value!r}, but it is a whole number from 0: correct or remove the line"
            )
    known = str(fields.get("system_prompt_hash") or "")
    parents = fields.get("parents")
    if parents is not None and not (
        isinstance(parents, list) and all(type(p) is int for p in cast("list[Any]", parents))
    ):
        raise ConfigError(f"{where}: parents is {parents!r}, but it is a list of call indexes or null")
    before = fields.get("prev_role")
    return Call(
        **{name: str(fields[name]) for name in _TEXTS},
        **{name: fields[name] for name in _COUNTS},
        prev_role=None if before is None else str(before),
        system_prompt=prompts.get(known) or str(fields.get("system_prompt") or ""),
        system_prompt_hash=known,
        input_text=str(fields.get("input_text") or ""),
        token_source=str(fields.get("token_source") or ""),
        parents=None if parents is None else tuple(cast("list[int]", parents)),
        ts_start=_moment(fields, "ts_start", where),
        ts_end=_moment(fields, "ts_end", where),
    )


def _moment(fields: Mapping[str, Any], name: str, where: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: {name} is {value!r}, but it is epoch seconds or null")
    return float(value)
