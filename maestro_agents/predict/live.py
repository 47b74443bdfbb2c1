"""The predictor of a running scheduler: what `learn.Predictor` says, and which model it says it by.

Statistics, offsets and errors learn from every finished stage at once. Besides, on the leader, the model is trained again in a
process of its own when enough is new (`RETRAIN_ROWS`, `RETRAIN_S`); what proves better on the newest stages (`trainer.Verdict`) is
published through the queue under a version, and every scheduler of the pool takes it over. The former model stays loaded beside
it: both are held against every stage that ends, and where the new one is worse, the former is published again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

from maestro_agents.core import EngineSpec, Observation, Prediction, Ticket
from maestro_agents.errors import ModelUnusable, QueueUnavailable
from maestro_agents.ports import MODEL_BYTES, Queue
from maestro_agents.predict import trainer
from maestro_agents.predict.features import usable
from maestro_agents.predict.learn import Predictor
from maestro_agents.predict.length import LengthModel
from maestro_agents.predict.roles import Estimate, Stage, prediction, teaches
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

STATUS_S: Final = 5.0
"""Seconds between two words on how it goes, for `maestro predict status`."""

STATUS_ROLES: Final = 200

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


class Learner:
    """Keeps `roles.Predicts`: predicts by the pool's model, learns from what ends, and sees to it that the model gets better.

    ``model``: what predicts until the pool has one. ``retrain``: train it again, when leading.
    """

    def __init__(self, model: LengthModel | None = None, *, retrain: bool = True) -> None:
        self.predictor = Predictor(model)
        self.version = version_of(model)
        self.since_s = 0.0
        self.retrain = retrain
        self.rows = trainer.Rows()
        #: Finished stages that no training has seen.
        self.new_rows = 0
        self.trial: Trial | None = None
        self.verdict: trainer.Verdict | None = None
        #: Why the last training came to nothing, and which published model was refused; "" where all went well.
        self.trouble = ""
        self.rollbacks: deque[dict[str, Any]] = deque(maxlen=5)
        self._known_until_s = trainer.known_until_s(model)
        self._data: bytes | None = None
        self._had = {self.version}
        self._published: str | None = None
        self._now_s = 0.0
        self._reload_at_s = self._train_at_s = self._tell_at_s = 0.0
        self._told = ""
        #: Stage -> until when its estimate counts, and the estimate.
        self._estimates: dict[str, tuple[float, Estimate]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._bugs: set[tuple[str, type[Exception]]] = set()

    # -- predict, observe --------------------------------------------------------------------------------------------
    def predict(
        self, tickets: Sequence[Ticket], engines: Mapping[str, EngineSpec], workflows: Workflows
    ) -> dict[str, Prediction]:
        """See `Predicts`. Where the model fails, statistics speak."""
        known = {t.stage_id: e for t in tickets if (e := self._estimates.get(t.stage_id)) and e[0] > self._now_s}
        new = [t for t in tickets if t.stage_id not in known]
        try:
            until_s = self._now_s + ESTIMATE_S
            known |= {t.stage_id: (until_s, e) for t, e in zip(new, self.predictor.estimate(new), strict=True)}
        except Exception as e:
            self._bug("predicting", e)
            return self.predictor.statistics.predict(tickets, engines, workflows)
        self._estimates = known
        return {
            t.stage_id: prediction(t, known[t.stage_id][1], engines[t.model], workflows.remaining(t)) for t in tickets
        }

    def observe(self, finished: Sequence[Observation]) -> None:
        """See `Predicts`. What a model was trained on teaches the statistics, and says nothing of how wrong it is."""
        pairs: list[tuple[Stage, int]] = []
        for o in filter(teaches, finished):
            found = trainer.example_of(o)
            known = o.finished_at_s <= self._known_until_s
            if found is not None:
                self.rows.add(trainer.Row.of(found, o.finished_at_s))
                self.new_rows += not known
            if known:
                self.predictor.statistics.add(found or o, o.choice_tokens)
            else:
                pairs.append((found or o, o.choice_tokens))
        try:
            if self.trial is not None:
                self._try(self.trial, [(s, n) for s, n in pairs if usable(s.features)])
        except Exception as e:
            self._bug("trying a model", e)
        try:
            self.predictor.teach(pairs)
        except Exception as e:
            self._bug("learning", e)

    def _try(self, trial: Trial, pairs: Sequence[tuple[Stage, int]]) -> None:
        """Hold both models against what ended."""
        stages = [s for s, _ in pairs]
        said = zip(self.predictor.estimate(stages), trial.former.estimate(stages), pairs, strict=True)
        for ours, theirs, (_, tokens) in said:
            trial.add(abs(ours.p50 - tokens), abs(theirs.p50 - tokens))
        trial.former.teach(pairs, statistics=False)

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
        if epoch is None:
            return
        if self.trial is not None and self.trial.lost:
            await self._go_back(queue, self.trial, epoch)
        if (
            self.retrain
            and "training" not in self._tasks
            and self.new_rows >= RETRAIN_ROWS
            and now_s >= self._train_at_s
        ):
            self._train_at_s = now_s + RETRAIN_S
            self._start("training", self._train(queue, epoch))
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
        model = await asyncio.to_thread(LengthModel.decode, data, f"model {version}") if data else None
        log.info("output lengths are predicted by model %s from now on", version)
        self._adopt(model, version, data, on_trial=on_trial and version not in self._had)

    def _adopt(self, model: LengthModel | None, version: str, data: bytes, *, on_trial: bool) -> None:
        former = Trial(former=self.predictor, version=self.version, data=self._data) if on_trial else None
        predictor = Predictor(model)
        predictor.statistics = self.predictor.statistics
        self._use(predictor, version, data)
        self.trial = former
        if self._known_until_s:
            self.new_rows = self.rows.after(self._known_until_s)

    def _use(self, predictor: Predictor, version: str, data: bytes | None) -> None:
        self.predictor, self.version, self._data = predictor, version, data
        self.since_s, self.trouble, self.trial = self._now_s, "", None
        self._known_until_s = trainer.known_until_s(predictor.model)
        self._had.add(version)
        self._estimates = {}

    async def _file(self) -> bytes:
        """The file of the model in use, empty for none."""
        model = self.predictor.model
        if self._data is None and model is not None:
            self._data = await asyncio.to_thread(model.encode)
        return self._data or b""

    async def _train(self, queue: Queue, epoch: int) -> None:
        """Train in another process, and publish what is better."""
        moment = time.gmtime(self._now_s)
        self.new_rows = 0
        job = trainer.Job(
            rows=self.rows.latest(),
            current=await self._file(),
            version=time.strftime("live-%Y%m%dT%H%M%SZ", moment),
            trained_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", moment),
        )
        self.verdict, data = await trainer.train_apart(job)
        self.trouble = ""
        if not data:
            log.info("a model trained on %d stages is not used: %s", len(job.rows), self.verdict.against)
            return
        if len(data) > MODEL_BYTES:
            raise ModelUnusable(f"the model that was trained has {len(data)} bytes: {MODEL_BYTES} at most")
        model = await asyncio.to_thread(LengthModel.decode, data)
        if not await queue.models():  # what an operator can go back to
            await queue.publish_model(self.version, card="{}", data=job.current, epoch=epoch)
        card = json.dumps({"rows": model.card.rows, "trained_at": job.trained_at, **self.verdict.to_json()})
        if await queue.publish_model(job.version, card=card, data=data, epoch=epoch):
            self._published = job.version
            v = self.verdict
            log.info("model %s is published: error %.1f tokens, the median's %.1f", job.version, v.mae, v.median_mae)
            self._adopt(model, job.version, data, on_trial=True)

    async def _go_back(self, queue: Queue, trial: Trial, epoch: int) -> None:
        """Publish the former model again."""
        model = trial.former.model
        data = trial.data
        if data is None and model is not None:
            data = await asyncio.to_thread(model.encode)
        card = json.dumps({"instead_of": self.version, **trial.to_json()})
        if not await queue.publish_model(trial.version, card=card, data=data or b"", epoch=epoch):
            return
        told = trial.to_json()
        log.warning(
            "model %s is worse than %s (error %.1f tokens, not %.1f): %s predicts again",
            *(self.version, trial.version, told["mae"], told["former_mae"], trial.version),
        )
        self.rollbacks.append({"at_s": self._now_s, "from": self.version, "to": trial.version, **told})
        self._published = trial.version
        self._use(trial.former, trial.version, data)

    # -- tell --------------------------------------------------------------------------------------------------------
    def status(self) -> dict[str, Any]:
        """How it goes, in numbers and names of roles: what `maestro predict status` shows."""
        model = self.predictor.model
        return {
            "version": self.version,
            "since_s": round(self.since_s, 1),
            "trained_at": model.card.trained_at if model else "",
            "trained_rows": model.card.rows if model else 0,
            "roles": self.predictor.status()[:STATUS_ROLES],
            "retrain": self.retrain,
            "window_rows": len(self.rows),
            "window_roles": self.rows.roles,
            "new_rows": self.new_rows,
            "last_training": self.verdict.to_json() if self.verdict else None,
            "trial": self.trial.to_json() if self.trial else None,
            "rollbacks": list(self.rollbacks),
            "trouble": self.trouble,
        }


def version_of(model: LengthModel | None) -> str:
    """A model's version as one word."""
    return NO_MODEL if model is None else "-".join(model.card.version.split()) or "untitled"
