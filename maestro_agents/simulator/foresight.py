"""What the predictor would have said of every recorded call, had it never seen the task: predictions with their real errors.

Tasks fall into `FOLDS` parts (a task that several apps solve is in one part in all of them). What is foreseen of a part's calls
comes from what was learned of the other parts alone, then frozen (in the words of `predict.backtest`: ``trained``):

- how long each answer is: a `LengthModel` with its `Predictor`, as `maestro predict eval` measures them ("ours"). Calls without
  recorded texts are predicted from numbers and history;
- what its run does after it, as a live scheduler learns it (`predict.rest`): `Workflows`, taught by the other parts' runs as if
  nothing had waited (`workload.REFERENCE`), corrected (`roles.corrected`) by a second `LengthModel`, which sees the prompt and
  the run so far, where `Workflows` know role and visit.

Training takes minutes, so what came of it is kept in a file (`write_foreseen`, `read_foreseen`).
"""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from maestro_agents.core import Observation, ServiceClass, Status, Ticket
from maestro_agents.errors import ConfigError
from maestro_agents.predict.backtest import examples_of, trained
from maestro_agents.predict.features import estimate_ratios
from maestro_agents.predict.learn import Predictor
from maestro_agents.predict.length import MIN_ROWS, Example, Progress
from maestro_agents.predict.rest import rest_of
from maestro_agents.predict.roles import Estimate, corrected
from maestro_agents.predict.traces import Call, folds_by_task, read_calls
from maestro_agents.simulator.sessions import Foresight, Session, end_of, sessions, stages
from maestro_agents.simulator.workload import REFERENCE, Foreseen, kind_of, lines_of, write_lines
from maestro_agents.workflow import Remaining, Workflows

FOLDS: Final = 4
"""Parts of the tasks. What is foreseen of one was learned of the others: three quarters of the trace."""

_WORDS: Final = ("system_prompt", "system_prompt_hash", "input_text", "token_source")
"""What calls as JSON lines tell beside the numbers."""

_FORMAT: Final = 1
_MAGIC: Final = "maestro_foreseen"
_FIELDS: Final = tuple(f.name for f in fields(Foreseen))


def foresee(trace: Path, texts: Path | None = None, *, seed: int = 0, progress: Progress | None = None) -> Foresight:
    """What is foreseen of each call of each session of a trace.

    ``trace``: what `sessions.sessions` reads; ``texts``: calls as JSON lines that tell what some of its calls said, found by app,
    session and call index. The same files and seed give the same. Raises `ConfigError` for a file that is wrong.
    """
    known = _read(trace, texts, seed)
    said: dict[int, Foreseen] = {}
    for k, (seen, asked) in enumerate(known.parts()):
        own, rest = (
            _asked(of, seen, asked, seed, progress, (2 * k + half) / (2 * FOLDS))
            for half, of in enumerate((known.examples, known.rests))
        )
        mostly = _mostly(known, seen, asked, seed)
        for i, length, after, left in zip(asked, own, rest, mostly, strict=True):
            said[i] = _foreseen(length, after, left)
    if progress:
        progress("done", 1.0)
    found: defaultdict[tuple[str, str], list[Foreseen]] = defaultdict(list)
    for i, call in enumerate(known.calls):
        found[call.app, call.session_id].append(said[i])
    return dict(found)


class Rest(NamedTuple):
    """Output tokens that the run of a call still wrote after it, and what was said of them by what never saw its task."""

    app: str
    truth: int
    #: `Workflows`, taught by the other runs.
    workflows: float
    #: The second predictor without a model, taught by the other runs: the running median of role and visit.
    median: float
    #: ``workflows``, corrected by the model that was trained on the other runs: what policies are told.
    model: float


def rests(trace: Path, texts: Path | None = None, *, seed: int = 0, progress: Progress | None = None) -> list[Rest]:
    """How well the rest of each call's run is known, as `foresee` foresees it. The same arguments; the same errors."""
    known = _read(trace, texts, seed)
    found: list[Rest] = []
    for k, (seen, asked) in enumerate(known.parts()):
        by_model = _asked(known.rests, seen, asked, seed, progress, k / FOLDS, parts=FOLDS)
        median = Predictor(None)
        median.teach([(known.rests[i], known.rests[i].output_tokens) for i in seen])
        by_median = median.estimate([known.rests[i] for i in asked])
        mostly = _mostly(known, seen, asked, seed)
        for i, model, plain, left in zip(asked, by_model, by_median, mostly, strict=True):
            app, truth = known.calls[i].app, known.rests[i].output_tokens
            found.append(Rest(app, truth, left.output_tokens, plain.p50, corrected(left, model).output_tokens))
    if progress:
        progress("done", 1.0)
    return found


class _Trace(NamedTuple):
    """A trace, call by call, as what is learned from."""

    calls: list[Call]
    fold: list[int]
    examples: list[Example]
    #: The same, their targets what their runs still write.
    rests: list[Example]
    #: Each run's observations, and the run of each call.
    played: list[list[Observation]]
    run_of: list[int]

    def parts(self) -> Iterator[tuple[list[int], list[int]]]:
        """(calls that are learned from, calls that are asked about) for each fold."""
        for k in range(FOLDS):
            yield [i for i, f in enumerate(self.fold) if f != k], [i for i, f in enumerate(self.fold) if f == k]


def _read(trace: Path, texts: Path | None, seed: int) -> _Trace:
    recorded = sessions(trace)
    calls = _calls(trace, texts, recorded)
    examples = examples_of(calls, seed=seed, ratios=estimate_ratios(calls))
    played = [_played(s, str(n)) for n, s in enumerate(recorded)]
    after = [rest for log in played for rest in rest_of(log)]
    return _Trace(
        calls=calls,
        fold=folds_by_task(calls, FOLDS, seed),
        examples=examples,
        rests=[replace(e, output_tokens=tokens, short=not n) for e, (n, tokens) in zip(examples, after, strict=True)],
        played=played,
        run_of=[n for n, s in enumerate(recorded) for _ in s.calls],
    )


def _mostly(known: _Trace, seen: Sequence[int], asked: Sequence[int], seed: int) -> list[Remaining]:
    """What `Workflows` that were taught by the runs of some calls say of others."""
    taught = _taught([known.played[n] for n in dict.fromkeys(known.run_of[i] for i in seen)], seed)
    return [
        taught.remaining(
            Ticket(
                stage_id="s",
                client_id="c",
                run_id="r",
                model=known.calls[i].model,
                workflow=known.calls[i].app,
                role=known.calls[i].role,
                node=known.calls[i].role,
                visit=known.examples[i].visit,
            )
        )
        for i in asked
    ]


def _asked(
    examples: Sequence[Example],
    seen: Sequence[int],
    asked: Sequence[int],
    seed: int,
    progress: Progress | None,
    done: float,
    *,
    parts: int = 2 * FOLDS,
) -> list[Estimate]:
    """What is said of some examples by a predictor that learned of others, one of so many ``parts`` of the work."""

    def tell(what: str, share: float) -> None:
        if progress:
            progress(what, done + share / parts)

    known = [examples[i] for i in seen]
    if len(known) >= MIN_ROWS:
        predictor = trained(known, seed=seed, progress=tell)[1]
    else:
        predictor = Predictor(None)
        predictor.teach([(e, e.output_tokens) for e in known])
    return predictor.estimate([examples[i] for i in asked])


def _foreseen(own: Estimate, rest: Estimate, known: Remaining) -> Foreseen:
    """``own``: of the call. ``rest``: of what its run writes after it; ``known``: what its role's runs mostly do after it."""
    left = corrected(known, rest)
    numbers = {
        "output_tokens_mean": own.mean,
        "output_tokens_p50": own.p50,
        "output_tokens_p90": own.p90,
        "output_tokens_p99": own.p99,
        **{name: getattr(left, name) for name in ("stages", "output_tokens", "prompt_tokens", "tool_s", "ends_p")},
    }
    return Foreseen(basis=own.basis, **{name: round(value, 3) for name, value in numbers.items()})


# -- recorded calls ------------------------------------------------------------------------------------------------------
def _calls(trace: Path, texts: Path | None, recorded: Sequence[Session]) -> list[Call]:
    """The calls of a trace, session by session as ``recorded``, with what ``texts`` tells of them."""
    if kind_of(trace) == "calls":
        rows = read_calls(trace)
    else:
        rows = [
            Call(
                app=r["app"],
                task_id=r["task_id"],
                session_id=r["session_id"],
                call_index=int(r["call_index"]),
                role=r["role"],
                model=r["model"],
                input_tokens=int(r["input_tokens"]),
                output_tokens=int(r["output_tokens"]),
            )
            for r in csv.DictReader(line for _, line in lines_of(trace))
        ]
    told = {(c.app, c.session_id, c.call_index): c for c in (read_calls(texts) if texts else ())}
    found: defaultdict[tuple[str, str, str], list[Call]] = defaultdict(list)
    for row in rows:
        text = told.get((row.app, row.session_id, row.call_index), row)
        words = {name: getattr(text, name) for name in _WORDS}
        found[row.app, row.session_id, row.task_id].append(replace(row, **words))
    return [c for s in recorded for c in sorted(found[s.app, s.session_id, s.task_id], key=lambda c: c.call_index)]


def _played(session: Session, run_id: str) -> list[Observation]:
    """What the observation log would hold of a session, had nothing waited."""
    log: list[Observation] = []
    for n, stage in enumerate(stages(session, str)):
        began_s = max((log[i].finished_at_s for i in stage.after), default=0.0) + stage.gap_s
        log.append(
            Observation(
                stage_id=f"{run_id}-{n}",
                run_id=run_id,
                workflow=session.app,
                role=session.calls[n].role,
                node=session.calls[n].role,
                model=stage.model,
                engine_id="",
                service_class=ServiceClass.BATCH,
                tenant="",
                status=Status.DONE,
                visit=stage.visit,
                step=n + 1,
                prompt_tokens=stage.prompt_tokens,
                output_tokens=stage.output_tokens,
                pushed_at_s=began_s,
                granted_at_s=began_s,
                finished_at_s=began_s + REFERENCE.call_s(stage),
            )
        )
    return log


def _taught(logs: Sequence[list[Observation]], seed: int) -> Workflows:
    """`Workflows` that have seen some runs end, in a random order."""
    known = Workflows()
    for log in random.Random(seed).sample(logs, len(logs)):
        for o in log:
            known.observe(o)
        known.end_run(end_of(log, started_at_s=0.0, ended_at_s=max(o.finished_at_s for o in log)))
    return known


# -- as a file -----------------------------------------------------------------------------------------------------------
def write_foreseen(said: Foresight, path: Path) -> None:
    """Write what was foreseen (`workload.write_lines`)."""
    lines: list[Any] = [{_MAGIC: _FORMAT, "fields": _FIELDS}]
    lines += [[app, session, [astuple(f) for f in found]] for (app, session), found in said.items()]
    write_lines(path, lines)


def read_foreseen(path: Path, recorded: Sequence[Session]) -> Foresight:
    """Read what `write_foreseen` wrote. Raises `ConfigError` for a damaged file, and for one that was made of other sessions."""
    found: dict[tuple[str, str], list[Foreseen]] = {}
    number = 0
    try:
        for number, text in lines_of(path):
            line = json.loads(text)
            if number == 1:
                if line != {_MAGIC: _FORMAT, "fields": list(_FIELDS)}:
                    raise ValueError("it begins no file of predictions of this version")
                continue
            app, session, calls = line
            found[app, session] = [Foreseen(**dict(zip(_FIELDS, call, strict=True))) for call in calls]
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{path}, line {number}: {e}. Remove the file, it is made again") from e
    for s in recorded:
        if len(found.get((s.app, s.session_id), ())) != len(s.calls):
            raise ConfigError(
                f"{path} was made of another trace: it lacks calls of session {s.session_id!r} of {s.app}. Remove it, it is made again"
            )
    return found
