"""The predictor of a running scheduler: what `learn.Predictor` says, and which model it says it by.

Two questions are answered so (`Part`): what a stage will write, and what its run still writes after it. Statistics, offsets and
errors learn from every finished stage at once, those of the second question from every run's end (`predict.rest`). Besides, on the
leader, a part's model is trained again in a process of its own when enough is new (`RETRAIN_ROWS`, `RETRAIN_S`); what proves better
on the newest stages (`trainer.Verdict`) is published through the queue under a version, and every scheduler of the pool takes it
over. The former model stays loaded beside it: both are held against all that ends, and where the new one is worse, the former is
published again. One file holds both models, and each publication changes one of them.

The second model corrects what `Workflows` know (`roles.corrected`). Where there is none, or it does worse than they do, they speak.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, NamedTuple

from maestro_agents.core import EngineSpec, Observation, Prediction, RunEnd, Ticket
from maestro_agents.errors import ModelUnusable, QueueUnavailable
from maestro_agents.ports import MODEL_BYTES, Queue
from maestro_agents.predict import trainer
from maestro_agents.predict.features import usable
from maestro_agents.predict.learn import MAX_LEVELS, Errors, Predictor, told_by_role
from maestro_agents.predict.length import LengthModel, joined, split
from maestro_agents.predict.rest import OpenRuns, Told
from maestro_agents.predict.roles import Estimate, Stage, corrected, levels, prediction, teaches
from maestro_agents.workflow import Workflows

log = logging.getLogger("maestro.predict")

RETRAIN_ROWS: Final = 1_000
"""Finished stages that must be new before the model is trained again."""

RETRAIN_S: Final = 900.0
"""Seconds between two trainings."""

TRIAL_STAGES: Final = 300
"""Finished stages over which a new model and the former one are compared, again and again."""

WORSE: Final = 1.05
"""The new one is worse where its error is more than so many times the former's."""

RELOAD_S: Final = 2.0
"""Seconds between two looks at which model the pool has."""

ESTIMATE_S: Final = 1.0
"""Seconds for which the estimate of a waiting stage is not made again, whatever was learned meanwhile."""

REST_S: Final = 5.0
"""The same of what its run still writes after it, which is learned from ends of runs alone."""

STATUS_S: Final = 5.0
"""Seconds between two words on how it goes, for `maestro predict status`."""

STATUS_ROLES: Final = 200

MAX_ESTIMATES: Final = 20_000
"""Estimates that are remembered; then those of the latest question alone."""

TELL_CALLS: Final = 256
"""Calls of ended runs that are learned from together; fewer once in `ESTIMATE_S`."""

NO_MODEL: Final = "statistics"
"""The version that is none: online statistics predict alone."""

DEFAULT_FILE: Final = "default.model"


def shipped_model() -> LengthModel:
    """The model that ships with the package. Raises `ModelUnusable` where it is missing or cannot be used."""
    try:
        data = (resources.files("maestro_agents.predict") / DEFAULT_FILE).read_bytes()
    except OSError:
        raise ModelUnusable("no model ships with this maestro-agents") from None
    return LengthModel.decode(data, "the model that ships with maestro-agents")


def default_model() -> LengthModel | None:
    """`shipped_model`; None, with one warning in the log, where there is none."""
    try:
        return shipped_model()
    except ModelUnusable as e:
        log.warning("%s. Output lengths are predicted from online statistics.", e)
    return None


@dataclass(slots=True)
class Trial:
    """A new model beside the former one, on the same stages. Errors are sums of tokens since the last comparison."""

    former: Predictor
    version: str
    #: The former's file, None where it was never one of the queue's.
    data: bytes | None
    n: int = 0
    error: float = 0.0
    former_error: float = 0.0

    def add(self, error: float, former_error: float) -> None:
        if self.n >= TRIAL_STAGES and not self.lost:
            self.n, self.error, self.former_error = 0, 0.0, 0.0
        self.n += 1
        self.error += error
        self.former_error += former_error

    @property
    def lost(self) -> bool:
        """The new one is worse."""
        return self.n >= TRIAL_STAGES and self.error > WORSE * self.former_error

    def to_json(self) -> dict[str, Any]:
        n = max(1, self.n)
        return {"former": self.version, "n": self.n, "mae": self.error / n, "former_mae": self.former_error / n}


class Part:
    """One of the two questions: the model that answers it, what that is trained on, and the trial of a new one.

    ``reserves``: see `trainer.Verdict`.
    """

    def __init__(self, model: LengthModel | None = None, *, reserves: bool = True) -> None:
        self.reserves = reserves
        self.predictor = Predictor(model)
        self.version = version_of(model)
        self.rows = trainer.Rows()
        #: Rows that no training has seen.
        self.new_rows = 0
        self.trial: Trial | None = None
        self.verdict: trainer.Verdict | None = None
        self.train_at_s = 0.0
        self.known_until_s = trainer.known_until_s(model)
        #: By role on its model: errors of this model beside those of what is known without it (`Workflows`).
        self.beside: OrderedDict[str, Errors] = OrderedDict()
        self._data: bytes | None = None
        self._had = {self.version}

    def keep(self, row: trainer.Row) -> None:
        """Keep a row to train on."""
        self.rows.add(row)
        self.new_rows += row.ended_at_s > self.known_until_s

    def hold(self, pairs: Sequence[tuple[Stage, int]]) -> None:
        """Hold both models of a trial against what came; before it teaches."""
        if (trial := self.trial) is None:
            return
        pairs = [(s, n) for s, n in pairs if usable(s.features)]
        stages = [s for s, _ in pairs]
        said = zip(self.predictor.estimate(stages), trial.former.estimate(stages), pairs, strict=True)
        for ours, theirs, (_, tokens) in said:
            trial.add(abs(ours.p50 - tokens), abs(theirs.p50 - tokens))
        trial.former.teach(pairs, statistics=False)

    def is_by(self, version: str, model: LengthModel | None) -> bool:
        """This very model answers already."""
        mine = self.predictor.model
        return version == self.version and (mine and mine.card) == (model and model.card)

    def adopt(self, model: LengthModel | None, version: str, data: bytes, *, on_trial: bool) -> None:
        """Let another model answer; beside the one so far where ``on_trial``, and it was never in use."""
        former = Trial(former=self.predictor, version=self.version, data=self._data)
        predictor = Predictor(model)
        predictor.statistics = self.predictor.statistics
        on_trial = on_trial and version not in self._had
        self.use(predictor, version, data)
        self.trial = former if on_trial else None
        if self.known_until_s:
            self.new_rows = self.rows.after(self.known_until_s)

    def use(self, predictor: Predictor, version: str, data: bytes | None) -> None:
        self.predictor, self.version, self._data, self.trial = predictor, version, data, None
        self.known_until_s = trainer.known_until_s(predictor.model)
        self.beside = OrderedDict()
        self._had.add(version)

    async def file(self) -> bytes:
        """The file of the model in use, empty for none."""
        model = self.predictor.model
        if self._data is None and model is not None:
            self._data = await asyncio.to_thread(model.encode)
        return self._data or b""

    def status(self) -> dict[str, Any]:
        """How it goes, roles left out."""
        model = self.predictor.model
        return {
            "version": self.version,
            "trained_at": model.card.trained_at if model else "",
            "trained_rows": model.card.rows if model else 0,
            "window_rows": len(self.rows),
            "window_roles": self.rows.roles,
            "new_rows": self.new_rows,
            "last_training": self.verdict.to_json() if self.verdict else None,
            "trial": self.trial.to_json() if self.trial else None,
        }


class _Said(NamedTuple):
    """What was estimated of a waiting stage."""

    until_s: float
    own: Estimate
    rest_until_s: float
    #: Of the tokens that its run still writes; None where that is not asked.
    rest: Estimate | None


class Learner:
    """Keeps `roles.Predicts`: predicts by the pool's models, learns from what ends, and sees to it that they get better.

    ``model``: what predicts until the pool has one. ``retrain``: train again, when leading.
    """

    def __init__(self, model: LengthModel | None = None, *, retrain: bool = True) -> None:
        self.lengths = Part(model)
        self.rest = Part(reserves=False)
        self.open = OpenRuns()
        self.since_s = 0.0
        self.retrain = retrain
        #: Why the last training came to nothing, and which published model was refused; "" where all went well.
        self.trouble = ""
        self.rollbacks: deque[dict[str, Any]] = deque(maxlen=5)
        self._published: str | None = None
        self._now_s = 0.0
        self._reload_at_s = self._tell_at_s = self._learn_at_s = 0.0
        self._told = ""
        #: Of calls whose runs ended, not learned from yet.
        self._ended: list[Told] = []
        #: By stage.
        self._estimates: dict[str, _Said] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._bugs: set[tuple[str, type[Exception]]] = set()

    @property
    def predictor(self) -> Predictor:
        """What predicts output lengths."""
        return self.lengths.predictor

    @property
    def version(self) -> str:
        """Of the file that holds both models: their versions, the second's only where there is one."""
        return _named(self.lengths.version, self.rest.version)

    # -- predict, observe --------------------------------------------------------------------------------------------
    def predict(
        self, tickets: Sequence[Ticket], engines: Mapping[str, EngineSpec], workflows: Workflows
    ) -> dict[str, Prediction]:
        """See `Predicts`. Where the model fails, statistics speak."""
        now_s = self._now_s
        said = {t.stage_id: e for t in tickets if (e := self._estimates.get(t.stage_id))}
        known = {stage_id: e for stage_id, e in said.items() if e.until_s > now_s}
        new = [t for t in tickets if t.stage_id not in known]
        try:
            own = self.predictor.estimate(new)
        except Exception as e:
            self._bug("predicting", e)
            return self.predictor.statistics.predict(tickets, engines, workflows)
        after = {stage_id: (e.rest_until_s, e.rest) for stage_id, e in said.items() if e.rest_until_s > now_s}
        rest = self._rests([t for t in new if t.stage_id not in after])
        for t, e in zip(new, own, strict=True):
            known[t.stage_id] = _Said(
                now_s + ESTIMATE_S, e, *after.get(t.stage_id, (now_s + REST_S, rest.get(t.stage_id)))
            )
        self._estimates |= known
        if len(self._estimates) > MAX_ESTIMATES:
            self._estimates = known
        found: dict[str, Prediction] = {}
        for t in tickets:
            e, engine, left = known[t.stage_id], engines[t.model], workflows.remaining(t)
            if e.rest is not None:
                left = corrected(left, e.rest, decode_s_per_token=engine.decode_s_per_token)
            found[t.stage_id] = prediction(t, e.own, engine, left)
        return found

    def _rests(self, tickets: Sequence[Ticket]) -> dict[str, Estimate]:
        """What runs still write after some stages, where a model does better than `Workflows`."""
        if self.rest.predictor.model is None:
            return {}
        try:
            asked = [t for t in tickets if t.run_id and usable(t.features) and not self._rest_is_worse(t)]
            said = self.rest.predictor.estimate(asked)
        except Exception as e:
            self._bug("predicting the rest of runs", e)
            return {}
        return {t.stage_id: e for t, e in zip(asked, said, strict=True)}

    def _rest_is_worse(self, stage: Stage) -> bool:
        errors = self.rest.beside.get(levels(stage)[3])
        return errors is not None and errors.model_is_worse

    def observe(self, finished: Sequence[Observation]) -> None:
        """See `Predicts`. What a model was trained on teaches the statistics, and says nothing of how wrong it is."""
        pairs: list[tuple[Stage, int]] = []
        for o in finished:
            found = trainer.example_of(o)
            row = None if found is None else trainer.Row.of(found, o.finished_at_s)
            try:
                self.open.add(o, row)
            except Exception as e:
                self._bug("remembering calls", e)
            if not teaches(o):
                continue
            if row is not None:
                self.lengths.keep(row)
            if o.finished_at_s <= self.lengths.known_until_s:
                self.predictor.statistics.add(found or o, o.choice_tokens)
            else:
                pairs.append((found or o, o.choice_tokens))
        try:
            self.lengths.hold(pairs)
        except Exception as e:
            self._bug("trying a model", e)
        try:
            self.predictor.teach(pairs)
        except Exception as e:
            self._bug("learning", e)

    def end_run(self, run: RunEnd, workflows: Workflows) -> None:
        """See `Predicts`. What its calls teach is learned within `ESTIMATE_S`."""
        try:
            self._ended += self.open.end(run, workflows)
            if len(self._ended) >= TELL_CALLS:
                self._learn_rests()
        except Exception as e:
            self._bug("learning the rest of runs", e)

    def _learn_rests(self) -> None:
        """Learn from the calls of runs that ended. What the model was trained on teaches the statistics alone."""
        self._learn_at_s = self._now_s + ESTIMATE_S
        ended, self._ended = self._ended, []
        new: list[Told] = []
        pairs: list[tuple[Stage, int]] = []
        for told in ended:
            stage = trainer.example(told.row)
            if told.row.features:
                self.rest.keep(told.row)
            if told.row.ended_at_s <= self.rest.known_until_s:
                self.rest.predictor.statistics.add(stage, stage.output_tokens)
            else:
                new.append(told)
                pairs.append((stage, stage.output_tokens))
        self.rest.hold(pairs)
        for said, (stage, tokens), told in zip(self.rest.predictor.teach(pairs), pairs, new, strict=True):
            if said is not None:
                key = levels(stage)[3]
                errors = self.rest.beside.setdefault(key, Errors(1))
                errors.add((abs(told.known_tokens - tokens),), abs(said.p50 - tokens), covered=tokens <= said.p90)
                self.rest.beside.move_to_end(key)
        while len(self.rest.beside) > MAX_LEVELS:
            self.rest.beside.popitem(last=False)

    def changed_p99(self) -> dict[str, float]:
        """See `Predicts`."""
        return self.predictor.changed_p99()

    # -- tend --------------------------------------------------------------------------------------------------------
    async def tend(
        self, queue: Queue, *, epoch: int | None, now_s: float, more: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Take over a model that was published; on the leader also: go back to the former, train, tell how it goes."""
        if not self._now_s:
            self.since_s = now_s
        self._now_s = now_s
        await self._look(queue)
        if self._ended and now_s >= self._learn_at_s:
            try:
                self._learn_rests()
            except Exception as e:
                self._bug("learning the rest of runs", e)
        if epoch is None:
            return
        for part in (self.lengths, self.rest):
            if part.trial is not None and part.trial.lost:
                await self._go_back(queue, part, part.trial, epoch)
            due = self.retrain and part.new_rows >= RETRAIN_ROWS and now_s >= part.train_at_s
            if due and "training" not in self._tasks:
                part.train_at_s = now_s + RETRAIN_S
                self._start("training", self._train(queue, part, epoch))
        if now_s >= self._tell_at_s:
            self._tell_at_s = now_s + STATUS_S
            told = json.dumps({**self.status(), **more()}, allow_nan=False)
            if told != self._told:
                await queue.set_predictor_status(told)
                self._told = told

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside the rounds."""

        async def body() -> None:
            try:
                await work
            except (ModelUnusable, QueueUnavailable) as e:
                self.trouble = str(e)
                log.warning("%s. The model in use stays.", str(e).rstrip("."))
            except Exception as e:
                self.trouble = f"{type(e).__name__}: {e}"
                self._bug(name, e)
            finally:
                del self._tasks[name]

        self._tasks[name] = asyncio.create_task(body())

    def _bug(self, where: str, error: Exception) -> None:
        """Log an unexpected exception, once per kind."""
        if (where, type(error)) not in self._bugs:
            self._bugs.add((where, type(error)))
            log.error("a bug (%s); statistics go on", where, exc_info=error)

    # -- which model -------------------------------------------------------------------------------------------------
    async def _look(self, queue: Queue) -> None:
        """See whether the pool has another model. The first is waited for; later ones are read beside the rounds."""
        if self._now_s < self._reload_at_s or "loading" in self._tasks:
            return
        self._reload_at_s = self._now_s + RELOAD_S
        first = self._published is None
        found = await queue.model(self._published or "")
        self._published = self._published or ""
        if found is None:
            return
        self._published = found[0]
        self._start("loading", self._take_over(*found, on_trial=not first))
        if first:
            await self._tasks["loading"]

    async def _take_over(self, version: str, data: bytes, *, on_trial: bool) -> None:
        files = await asyncio.to_thread(split, data)
        read = [await asyncio.to_thread(LengthModel.decode, f, f"model {version}") if f else None for f in files]
        log.info("output lengths are predicted by model %s from now on", version)
        lengths, _, rest = version.partition("+")
        for part, name, model, file in zip(
            (self.lengths, self.rest), (lengths, rest or NO_MODEL), read, files, strict=True
        ):
            if not part.is_by(name, model):
                part.adopt(model, name, file, on_trial=on_trial)
        self._changed()

    def _changed(self) -> None:
        """Another model predicts."""
        self.since_s, self.trouble, self._estimates = self._now_s, "", {}

    async def _train(self, queue: Queue, part: Part, epoch: int) -> None:
        """Train in another process, and publish what is better."""
        moment = time.gmtime(self._now_s)
        part.new_rows = 0
        job = trainer.Job(
            rows=part.rows.latest(),
            current=await part.file(),
            version=time.strftime("live-%Y%m%dT%H%M%SZ", moment),
            trained_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", moment),
            reserves=part.reserves,
        )
        part.verdict, data = await trainer.train_apart(job)
        self.trouble = ""
        if not data:
            log.info("a model trained on %d stages is not used: %s", len(job.rows), part.verdict.against)
            return
        model = await asyncio.to_thread(LengthModel.decode, data)
        if not await queue.models():  # what an operator can go back to
            await self._publish(queue, part, part.version, job.current, epoch=epoch, card="{}")
        card = json.dumps({"rows": model.card.rows, "trained_at": job.trained_at, **part.verdict.to_json()})
        if await self._publish(queue, part, job.version, data, epoch=epoch, card=card):
            part.adopt(model, job.version, data, on_trial=True)
            self._changed()
            v = part.verdict
            log.info("model %s is published: error %.1f tokens, the median's %.1f", self.version, v.mae, v.median_mae)

    async def _publish(self, queue: Queue, part: Part, version: str, data: bytes, *, epoch: int, card: str) -> bool:
        """Publish the file of both models, this part of it replaced. False: a newer epoch rules. Raises `ModelUnusable`."""
        names = [version if p is part else p.version for p in (self.lengths, self.rest)]
        files = [data if p is part else await p.file() for p in (self.lengths, self.rest)]
        both, name = await asyncio.to_thread(joined, *files), _named(*names)
        if len(both) > MODEL_BYTES:
            raise ModelUnusable(f"the model that was trained has {len(both)} bytes: {MODEL_BYTES} at most")
        if not await queue.publish_model(name, card=card, data=both, epoch=epoch):
            return False
        self._published = name
        return True

    async def _go_back(self, queue: Queue, part: Part, trial: Trial, epoch: int) -> None:
        """Publish the former model of a part again."""
        model = trial.former.model
        data = trial.data
        if data is None and model is not None:
            data = await asyncio.to_thread(model.encode)
        was, told = self.version, trial.to_json()
        card = json.dumps({"instead_of": was, **told})
        if not await self._publish(queue, part, trial.version, data or b"", epoch=epoch, card=card):
            return
        part.use(trial.former, trial.version, data)
        self._changed()
        log.warning(
            "model %s is worse than %s (error %.1f tokens, not %.1f): %s predicts again",
            *(was, self.version, told["mae"], told["former_mae"], self.version),
        )
        self.rollbacks.append({"at_s": self._now_s, "from": was, "to": self.version, **told})

    # -- tell --------------------------------------------------------------------------------------------------------
    def status(self) -> dict[str, Any]:
        """How it goes, in numbers and names of roles: what `maestro predict status` shows."""
        return {
            **self.lengths.status(),
            "version": self.version,
            "since_s": round(self.since_s, 1),
            "roles": self.predictor.status()[:STATUS_ROLES],
            "rest": {**self.rest.status(), "open_calls": len(self.open), "roles": self._rest_roles()[:STATUS_ROLES]},
            "retrain": self.retrain,
            "rollbacks": list(self.rollbacks),
            "trouble": self.trouble,
        }

    def _rest_roles(self) -> list[dict[str, Any]]:
        rows = told_by_role(self.rest.beside, other="workflow")
        worse = {(r["model"], r["role"]) for r in self.rest.predictor.status() if r["uses"] == "median"}
        return [{**r, "uses": "workflow"} if (r["model"], r["role"]) in worse else r for r in rows]


def _named(lengths: str, rest: str) -> str:
    return lengths if rest == NO_MODEL else f"{lengths}+{rest}"


def version_of(model: LengthModel | None) -> str:
    """A model's version as one word."""
    return NO_MODEL if model is None else "-".join(model.card.version.split()) or "untitled"
