"""Learning online: what is trained on, what is published, taken over and taken back, and that nothing of it stops the scheduler."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import os
import random
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from maestro_agents.cli import serve
from maestro_agents.core import EngineSpec, Grant, Observation, ServiceClass, Status, Ticket
from maestro_agents.errors import ModelUnusable
from maestro_agents.fleet import Fleet
from maestro_agents.ports import Queue
from maestro_agents.predict import live, trainer
from maestro_agents.predict.features import FEATURE_NAMES, FEATURES_VERSION
from maestro_agents.predict.length import LengthModel, train
from maestro_agents.predict.live import Learner, Trial, default_model
from maestro_agents.predict.roles import WINDOW, RoleStatistics
from maestro_agents.predict.trainer import Job, Row, Rows, Verdict, example_of, fitted, train_apart
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.scheduler import Scheduler
from maestro_agents.settings import Settings
from maestro_agents.workflow import Workflows
from tests.queues import fresh_redis_queue

ROWS = 400
NOW_S = 1_790_000_000.0
AT = {name: i for i, name in enumerate(FEATURE_NAMES)}
ASKED = (5, 10, 20, 40, 80, 160)
ENGINE = EngineSpec(engine_id="a", url="http://a/v1", model="m", slots=2)


def vector(**known: float) -> tuple[float, ...]:
    """Features of which only these are known."""
    found = [-1.0] * len(FEATURE_NAMES)
    found[0] = FEATURES_VERSION
    for name, value in known.items():
        found[AT[name]] = value
    return tuple(found)


def ended(
    asked: int = 10, output_tokens: int = 40, *, n: int = 0, role: str = "app:writer", **more: Any
) -> Observation:
    """A finished stage whose prompt asked for so many words."""
    known: dict[str, Any] = {
        "stage_id": f"s{n}",
        "run_id": f"r{n // 2}",
        "role": role,
        "status": Status.DONE,
        "prompt_tokens": 120,
        "output_tokens": output_tokens,
        "granted_at_s": NOW_S + n,
        "finished_at_s": NOW_S + n + 1,
        "features": vector(prompt_tokens=100, last_asked_words=asked),
        **more,
    }
    return Observation(
        workflow="w", node="n", model="m", engine_id="a", service_class=ServiceClass.BATCH, tenant="t", **known
    )


def world(n: int, *, start: int = 0, odd: bool = False, seed: int = 0) -> list[Observation]:
    """Stages whose length is four times the words asked for; in an ``odd`` world, the more is asked the less is written."""
    rng = random.Random(f"{seed} {start}")
    found: list[Observation] = []
    for i in range(start, start + n):
        asked = rng.choice(ASKED)
        tokens = (800 / asked if odd else asked) * 4 * math.exp(rng.gauss(0, 0.2))
        found.append(ended(asked, max(1, round(tokens)), n=i))
    return found


def rows_of(observations: Sequence[Observation]) -> list[Row]:
    return [Row.of(e, o.finished_at_s) for o in observations if (e := example_of(o))]


def made(*, odd: bool) -> LengthModel:
    """A model that was trained on a world, as if it were another pool's."""
    examples = [trainer.example(row) for row in rows_of(world(ROWS, odd=odd))]
    return train(examples, version="odd" if odd else "good", trained_at="long ago")


@pytest.fixture(scope="module")
def good() -> LengthModel:
    """A model of the world as it is."""
    return made(odd=False)


@pytest.fixture(scope="module")
def odd() -> LengthModel:
    """A model of another world."""
    return made(odd=True)


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[RedisQueue]:
    """A real Redis."""
    found = await fresh_redis_queue(redis_url)
    yield found
    await found.close()


class Clock:
    """Turned by hand."""

    at_s = NOW_S

    def now_s(self) -> float:
        return self.at_s


async def tended(learner: Learner, queue: Queue, *, epoch: int | None = 0, now_s: float = NOW_S) -> None:
    """One round's tending, and all that it set off."""
    await learner.tend(queue, epoch=epoch, now_s=now_s, more=dict)
    while learner._tasks:
        await asyncio.gather(*learner._tasks.values())


def said(learner: Learner, asked: int = 160, **more: Any) -> Any:
    """What a learner says of a waiting stage."""
    known = {"features": vector(prompt_tokens=100, last_asked_words=asked), "role": "app:writer", **more}
    t = Ticket(stage_id="w", client_id="c", model="m", prompt_tokens=100, **known)
    learner._estimates.clear()
    return learner.predict([t], {"m": ENGINE}, Workflows())["w"]


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= level]


# -- what is trained on --------------------------------------------------------------------------------------------------
def test_every_role_gets_an_equal_share_of_the_window_first() -> None:
    """A busy role gives up its oldest rows; a rare one keeps all of its own; the whole is bounded."""
    rows = Rows(100)
    for row in rows_of([ended(n=n, role="rare") for n in range(10)]):
        rows.add(row)
    for name in ("busy", "busier"):
        for row in rows_of([ended(n=n, role=name) for n in range(10, 1_000)]):
            rows.add(row)
    found = rows.latest()
    assert [r.role for r in found].count("rare") == 10
    assert [r.role for r in found].count("busy") == [r.role for r in found].count("busier") == 45
    assert min(r.ended_at_s for r in found if r.role == "busy") == NOW_S + 1 + 1_000 - 45
    assert [r.ended_at_s for r in found] == sorted(r.ended_at_s for r in found)
    assert len(rows) == 100


def test_more_roles_than_places_leave_the_latest() -> None:
    """A thousand roles of one stage each do not grow the window either."""
    rows = Rows(20)
    for row in rows_of([ended(n=n, role=f"r{n}") for n in range(1_000)]):
        rows.add(row)
    assert [r.role for r in rows.latest()] == [f"r{n}" for n in range(980, 1_000)]


@pytest.mark.parametrize(
    ("tools", "tool_calls", "tokens", "short"),
    [(2, 1, 300, True), (2, 0, 5, False), (0, 0, 32, True), (0, 0, 33, False), (-1, 0, 10, True)],
)
def test_a_short_answer_is_a_tool_call_where_tools_were_offered(
    tools: int, tool_calls: int, tokens: int, short: bool
) -> None:
    """Where none were, or nobody said, it is one of few tokens."""
    o = ended(output_tokens=tokens, tool_calls=tool_calls, features=vector(prompt_tokens=100, tools=tools))
    found = example_of(o)
    assert found is not None
    assert found.short is short


def test_an_example_has_the_apps_estimate_of_its_prompt_and_the_tokens_of_one_choice() -> None:
    """What will be known when a stage waits, not what the engine counted when it had ended."""
    found = example_of(ended(output_tokens=90, choices=3))
    assert found is not None
    assert (found.prompt_tokens, found.output_tokens, found.session) == (100, 30, "r0")
    again = trainer.example(Row.of(found, 1.0))
    assert again == found
    alone = example_of(ended(run_id="", n=7))
    assert alone is not None
    assert alone.group == "s7"


@pytest.mark.parametrize("features", [(), (1.0, 2.0), vector(last_words=math.nan), (99.0, *vector()[1:])])
def test_features_of_another_version_are_not_trained_on(features: tuple[float, ...]) -> None:
    """Nor those with a number that is none: such a stage teaches the statistics alone."""
    learner = Learner()
    learner.observe([ended(features=features), ended(status=Status.FAILED), ended(output_tokens=0)])
    assert len(learner.lengths.rows) == 0
    assert said(learner).basis == "role(1)"


def test_the_newest_runs_are_the_test_and_no_run_is_on_both_sides() -> None:
    """A run counts by the end of its last stage."""
    rows = rows_of(world(100))
    late = [r._replace(session="long") if i in {0, 99} else r for i, r in enumerate(rows)]
    older, newest = trainer.parted(late)
    assert {r.session for r in older} & {r.session for r in newest} == set()
    assert len(older) + len(newest) == 100
    assert late[0] in newest
    assert 15 <= len(newest) <= 20


# -- whether it is better ------------------------------------------------------------------------------------------------
def verdict(**changes: Any) -> Verdict:
    known: dict[str, Any] = {
        "rows": 1_000,
        "tested": 200,
        "mae": 40.0,
        "current_mae": 60.0,
        "median_mae": 80.0,
        "covered_p90": 0.9,
        "median_covered_p90": 0.9,
    }
    return Verdict(**{**known, **changes})


@pytest.mark.parametrize(
    ("changes", "against"),
    [
        ({}, ""),
        ({"current_mae": None}, ""),
        ({"mae": 59.5}, "the model in use"),
        ({"mae": 79.5, "current_mae": 90.0}, "the running median"),
        ({"mae": math.nan}, "the model in use"),
        ({"covered_p90": 0.84}, "84.0%"),
        ({"covered_p90": 0.97}, ""),
        ({"covered_p90": 0.97, "tested": 4_000}, "97.0%"),
        ({"covered_p90": 0.97, "tested": 4_000, "median_covered_p90": 0.98}, ""),
    ],
)
def test_a_candidate_must_beat_both_by_a_margin_and_cover_what_it_promises(
    changes: dict[str, Any], against: str
) -> None:
    """More than nine in ten is no fault where few were asked, or where lengths are so alike that even statistics cover more."""
    assert against in verdict(**changes).against
    assert bool(verdict(**changes).against) is bool(against)


def test_a_candidate_that_is_no_better_is_not_trained_again(good: LengthModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a model that knows this world already there is a verdict, and no file."""
    monkeypatch.setattr(trainer, "BETTER", 0.5)
    rows = rows_of(world(300, seed=1))
    found, data = fitted(Job(rows=rows, current=good.encode(), version="v", trained_at=""))
    assert found.current_mae is not None
    assert found.against
    assert data == b""


# -- the process ---------------------------------------------------------------------------------------------------------
async def test_training_that_fails_says_why() -> None:
    """The process's last words are in the error."""
    with pytest.raises(ModelUnusable, match="10 finished stages are too few"):
        await train_apart(Job(rows=rows_of(world(10)), version="v", trained_at=""))


async def test_training_that_is_cancelled_leaves_no_process() -> None:
    """A scheduler that ends does not leave a trainer behind."""
    started: list[asyncio.subprocess.Process] = []
    real = asyncio.create_subprocess_exec

    async def spy(*words: Any, **more: Any) -> asyncio.subprocess.Process:
        started.append(await real(*words, **more))
        return started[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "create_subprocess_exec", spy)
        task = asyncio.create_task(train_apart(Job(rows=rows_of(world(ROWS)), version="v", trained_at="")))
        async with asyncio.timeout(30):
            while not started:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await started[0].wait() != 0


# -- the life of a model -------------------------------------------------------------------------------------------------
async def test_a_pool_trains_a_model_that_beats_its_median_and_all_schedulers_take_it_over(
    queue: RedisQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any model to begin with: trained beside the rounds, which go on granting; published; read by a standby."""
    monkeypatch.setattr(live, "RETRAIN_ROWS", ROWS)
    clock, learner, standby = Clock(), Learner(), Learner()
    scheduler = Scheduler(queue, [ENGINE], clock=clock, holder="s", predictor=learner)
    assert await scheduler.lead()
    for o in world(ROWS):
        await queue.observe(o)
    await scheduler.step()  # learns
    assert said(learner).basis == f"role({WINDOW})"
    await standby.tend(queue, epoch=None, now_s=clock.at_s, more=dict)
    clock.at_s += 1
    await scheduler.step()  # begins to train
    assert "training" in learner._tasks
    waits = Ticket(stage_id="x", client_id="c", model="m", role="app:writer", due_at_s=clock.at_s, prompt_tokens=10)
    await queue.renew("c", {}, now_s=clock.at_s)
    await queue.announce(waits, None, now_s=clock.at_s)
    await scheduler.step()
    granted = await queue.verdicts("c", 1)
    assert [type(v) for v in granted] == [Grant]
    assert "training" in learner._tasks
    await asyncio.gather(*learner._tasks.values())
    assert learner.lengths.verdict is not None
    assert learner.lengths.verdict.mae < 0.6 * learner.lengths.verdict.median_mae
    assert learner.version.startswith("live-2026")
    assert [*await queue.models()] == [learner.version, "statistics"]  # what to go back to
    assert learner.lengths.trial is not None

    await tended(standby, queue, epoch=None, now_s=clock.at_s + 10)
    assert standby.version == learner.version
    for who in (learner, standby):
        long, short = said(who, 160), said(who, 5)
        assert long.basis == f"model {learner.version}"
        assert long.output_tokens_p50 > 8 * short.output_tokens_p50
    late = Learner()
    await late.tend(queue, epoch=None, now_s=clock.at_s, more=dict)
    assert late.version == learner.version  # waited for, before anything is learned
    assert late.lengths.trial is None


async def test_what_a_model_was_trained_on_does_not_count_as_its_error(queue: RedisQueue) -> None:
    """A scheduler that starts reads the log from its beginning: statistics learn from it, the model is judged by what came later."""
    observations = world(ROWS)
    _, data = fitted(Job(rows=rows_of(observations), version="v1", trained_at=""))
    standby, learner = Learner(), Learner()
    standby.observe([*observations, *world(7, start=ROWS)])
    await tended(standby, queue, epoch=None)
    await queue.publish_model("v1", card="{}", data=data, epoch=0)
    await tended(standby, queue, epoch=None, now_s=NOW_S + 10)
    assert (standby.version, standby.lengths.new_rows) == ("v1", 7)  # should it lead one day
    await tended(learner, queue)
    learner.observe(observations)
    assert learner.status()["roles"] == []
    assert learner.lengths.new_rows == 0
    assert learner.predictor.statistics.seen(observations[0]) == WINDOW
    learner.observe(world(20, start=ROWS))
    assert [r["n"] > 15 for r in learner.status()["roles"]] == [True]
    assert learner.lengths.new_rows == 20


async def test_a_model_that_turns_out_worse_is_taken_back(
    queue: RedisQueue, good: LengthModel, odd: LengthModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Live errors of both decide; the former is published again and predicts with all that it had learned; it is told."""
    learner, standby = Learner(good), Learner(good)
    for who in (learner, standby):
        await tended(who, queue, epoch=None)
    await queue.publish_model("odd", card="{}", data=odd.encode(), epoch=0)
    await tended(learner, queue, now_s=NOW_S + 10)
    await tended(standby, queue, epoch=None, now_s=NOW_S + 10)
    assert (learner.version, standby.version) == ("odd", "odd")
    learner.observe(world(live.TRIAL_STAGES - 1, seed=3))
    await tended(learner, queue, now_s=NOW_S + 20)
    assert learner.version == "odd"
    learner.observe(world(10, start=5_000, seed=3))
    await tended(learner, queue, now_s=NOW_S + 30)
    await tended(standby, queue, epoch=None, now_s=NOW_S + 30)
    assert (learner.version, standby.version) == ("good", "good")
    assert (learner.lengths.trial, standby.lengths.trial) == (None, None)
    assert [*await queue.models()] == ["good", "odd"]
    told = json.loads(await queue.predictor_status())["rollbacks"]
    assert [(r["from"], r["to"], r["mae"] > r["former_mae"]) for r in told] == [("odd", "good", True)]
    assert [m for m in messages(caplog) if "good predicts again" in m]
    assert len(learner.predictor.status()) == 1  # what the former had learned meanwhile was not lost


async def test_a_model_that_is_no_worse_stays(queue: RedisQueue, good: LengthModel, odd: LengthModel) -> None:
    """The other way round nothing is taken back, however long it goes on."""
    learner = Learner(odd)
    await tended(learner, queue)
    await queue.publish_model("good", card="{}", data=good.encode(), epoch=0)
    for i in range(3):
        await tended(learner, queue, now_s=NOW_S + 10 * (i + 1))
        learner.observe(world(live.TRIAL_STAGES, start=1_000 * i, seed=4))
    await tended(learner, queue, now_s=NOW_S + 60)
    assert learner.version == "good"
    assert learner.rollbacks.maxlen
    assert not learner.rollbacks


def test_drift_long_after_the_publication_is_noticed_too(good: LengthModel) -> None:
    """The comparison begins anew after each full one: what was won long ago does not outweigh what is lost now."""
    trial = Trial(former=Learner(good).predictor, version="v", data=None)
    for _ in range(10 * live.TRIAL_STAGES):
        trial.add(1.0, 100.0)
    assert not trial.lost
    for _ in range(live.TRIAL_STAGES):
        trial.add(100.0, 10.0)
    assert trial.lost


async def test_where_no_model_was_before_going_back_means_statistics(queue: RedisQueue, odd: LengthModel) -> None:
    """The version ``statistics`` is a word that every scheduler understands."""
    learner = Learner()
    await tended(learner, queue)
    await queue.publish_model("odd", card="{}", data=odd.encode(), epoch=0)
    await tended(learner, queue, now_s=NOW_S + 10)
    learner.lengths.trial = Trial(
        former=learner.lengths.trial.former, version="statistics", data=None, n=300, error=9e9
    )  # type: ignore[union-attr]
    await tended(learner, queue, now_s=NOW_S + 20)
    assert await queue.model("odd") == ("statistics", b"")
    late = Learner(odd)
    await tended(late, queue)
    assert late.version == learner.version == "statistics"
    assert said(late).basis == "prior"


async def test_a_leader_that_was_deposed_takes_nothing_back_and_publishes_nothing(
    queue: RedisQueue, good: LengthModel, odd: LengthModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both go under its epoch."""
    old = await queue.lead("first", ttl_s=1, now_s=NOW_S)
    await queue.lead("second", ttl_s=1, now_s=NOW_S + 2)
    learner = Learner(good)
    await tended(learner, queue, epoch=None)
    await queue.publish_model("odd", card="{}", data=odd.encode(), epoch=None)
    await tended(learner, queue, epoch=None, now_s=NOW_S + 10)
    learner.lengths.trial = Trial(former=Learner(good).predictor, version="good", data=None, n=300, error=9e9)
    await tended(learner, queue, epoch=old, now_s=NOW_S + 20)
    assert learner.version == "odd"

    async def trained(job: Job) -> tuple[Verdict, bytes]:
        return verdict(), good.encode()

    monkeypatch.setattr(trainer, "train_apart", trained)
    monkeypatch.setattr(live, "RETRAIN_ROWS", 1)
    learner.lengths.trial = None
    learner.observe(world(1))
    await tended(learner, queue, epoch=old, now_s=NOW_S + 30)
    assert learner.lengths.verdict is not None
    assert (learner.version, [*await queue.models()]) == ("odd", ["odd"])


async def test_only_a_leader_that_may_trains_and_not_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a standby, not with MAESTRO_RETRAIN=off, not before enough is new, not twice in a short time."""
    asked: list[Job] = []

    async def trained(job: Job) -> tuple[Verdict, bytes]:
        asked.append(job)
        return verdict(mae=99.0), b""

    monkeypatch.setattr(trainer, "train_apart", trained)
    monkeypatch.setattr(live, "RETRAIN_ROWS", 20)
    queue = MemoryQueue()
    learner, frugal = Learner(), Learner(retrain=False)
    for who in (learner, frugal):
        who.observe(world(19))
        await tended(who, queue)
        assert asked == []
        who.observe(world(1, start=19))
    await tended(frugal, queue, now_s=NOW_S + 1)
    await tended(learner, queue, epoch=None, now_s=NOW_S + 1)
    assert asked == []
    await tended(learner, queue, now_s=NOW_S + 2)
    assert [len(job.rows) for job in asked] == [20]
    learner.observe(world(50, start=100))
    await tended(learner, queue, now_s=NOW_S + 3)
    assert len(asked) == 1
    await tended(learner, queue, now_s=NOW_S + 3 + live.RETRAIN_S)
    assert [len(job.rows) for job in asked] == [20, 70]
    assert "not 2% below" in learner.status()["last_training"]["against"]


async def test_training_that_fails_is_told_and_everything_else_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log, and in the status."""

    async def trained(job: Job) -> tuple[Verdict, bytes]:
        raise ModelUnusable("no memory left")

    monkeypatch.setattr(trainer, "train_apart", trained)
    monkeypatch.setattr(live, "RETRAIN_ROWS", 1)
    learner, queue = Learner(), MemoryQueue()
    learner.observe(world(1))
    await tended(learner, queue)
    assert messages(caplog) == ["no memory left. The model in use stays."]
    await tended(learner, queue, now_s=NOW_S + live.STATUS_S)
    assert json.loads(await queue.predictor_status())["trouble"] == "no memory left"
    assert said(learner).basis == "role(1)"


def test_a_model_that_fails_keeps_nothing_from_the_statistics(
    good: LengthModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage teaches once, is kept once to train on, and the failure is told once."""

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    learner = Learner(good)
    monkeypatch.setattr(LengthModel, "predict", broken)
    for start in (0, 40):
        learner.observe(world(3, start=start))
    assert len(learner.lengths.rows) == 6
    counted = RoleStatistics()
    for o in (*world(3), *world(3, start=40)):
        counted.add(o, o.choice_tokens)
    for o in world(3):
        assert learner.predictor.statistics.seen(o) == counted.seen(o) > 0
    assert messages(caplog, logging.ERROR) == ["a bug (learning); statistics go on"]


# -- bad input -----------------------------------------------------------------------------------------------------------
def newer(model: LengthModel) -> bytes:
    """The file of a version that is still to come."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(model.encode())) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            body = old.read(name)
            new.writestr(name, json.dumps({**json.loads(body), "format": 99}) if name == "card.json" else body)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["corrupt", "newer", "cut"])
async def test_a_published_model_that_cannot_be_used_is_refused_once_and_scheduling_goes_on(
    queue: RedisQueue, good: LengthModel, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The model in use stays, also at the start, where it is the one that ships; the status names the trouble."""
    data = {"corrupt": b"no model at all", "newer": newer(good), "cut": good.encode()[:-500]}[kind]
    await queue.publish_model("bad", card="{}", data=data, epoch=0)
    clock, learner = Clock(), Learner(good)
    scheduler = Scheduler(queue, [ENGINE], clock=clock, holder="s", predictor=learner)
    assert await scheduler.lead()
    for _ in range(3):
        await scheduler.step()
        clock.at_s += 6
        await scheduler.lead()
    told = [m for m in messages(caplog) if "model bad" in m]
    assert len(told) == 1
    assert ("upgrade" if kind == "newer" else "cannot be read") in told[0]
    assert said(learner).basis == "model good"
    assert "model bad" in json.loads(await queue.predictor_status())["trouble"]


@pytest.mark.parametrize(
    "bad",
    [
        {"features": vector(last_words=math.nan)},
        {"features": vector(last_words=math.inf)},
        {"features": (2.0, *vector()[1:])},
        {"features": (1.0, 2.0)},
        {"features": ()},
    ],
)
def test_a_ticket_with_unusable_features_is_predicted_from_statistics(good: LengthModel, bad: dict[str, Any]) -> None:
    """An older or newer app, or a broken one, is served all the same; its neighbours have the model."""
    learner = Learner(good)
    learner.observe([ended(n=n) for n in range(5)])
    assert said(learner).basis == "model good"
    assert said(learner, **bad).basis == "role(5)"


@pytest.mark.parametrize("sketch", ["???", "AAA", "ZZZZ" * 5_000, "\x00"])
def test_a_sketch_that_is_none_is_no_trouble(good: LengthModel, sketch: str, caplog: pytest.LogCaptureFixture) -> None:
    """It says nothing; everything else of the ticket does."""
    learner = Learner(good)
    assert said(learner, sketch=sketch).basis == "model good"
    learner.observe([ended(sketch=sketch)])
    assert messages(caplog) == []


async def test_a_bug_in_the_model_is_told_once_and_statistics_predict(
    good: LengthModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Grants go on, and so does learning."""
    clock, queue, learner = Clock(), MemoryQueue(), Learner(good)

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    scheduler = Scheduler(queue, [ENGINE], clock=clock, holder="s", predictor=learner)
    learner.predictor.model.predict = broken  # type: ignore[union-attr, method-assign]
    assert await scheduler.lead()
    queue._log.extend(enumerate([ended(n=n, features=()) for n in range(3)], start=1))
    for n in range(2):
        features = vector(prompt_tokens=10)
        t = Ticket(stage_id=f"x{n}", client_id="c", model="m", role="app:writer", features=features)
        await queue.announce(t, None, now_s=clock.at_s)
        await scheduler.step()
    assert len(await queue.running()) == 2
    assert messages(caplog) == ["a bug (predicting); statistics go on"]
    assert said(learner).basis == "role(3)"


@pytest.mark.parametrize("there", ["missing", "corrupt"])
def test_without_a_default_model_statistics_predict(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning, no error."""
    if there == "corrupt":
        (tmp_path / "default.model").write_bytes(b"PK no")
    monkeypatch.setattr(live.resources, "files", lambda _: tmp_path)
    assert default_model() is None
    assert [m for m in messages(caplog) if "online statistics" in m]
    assert len(messages(caplog)) == 1


# -- where it is loaded --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def loaded() -> list[str]:
    """Modules of a process that made one call of its own queue, without Redis, under `maestro_langgraph`."""
    text = """
        import sys
        import maestro_langgraph
        from maestro_agents.client import Client
        from maestro_agents.core import Ticket
        p = Client.current().open(Ticket(stage_id="s", client_id="c", model="m"), original_url="http://own/v1")
        p.wait()
        p.finish(output_tokens=5)
        room = Client.current()._room
        assert room.scheduler is not None
        Client.reset()
        print(*sys.modules)
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    words = [sys.executable, "-c", textwrap.dedent(text)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=True).stdout.split()


def test_an_app_without_redis_schedules_its_calls_without_xgboost(loaded: list[str]) -> None:
    """The scheduler in the app's own process predicts from statistics: no xgboost, no scipy, and no numpy of ours."""
    assert "maestro_agents.scheduler" in loaded
    assert "maestro_agents.predict.roles" in loaded
    assert not {"xgboost", "scipy", "maestro_agents.predict.length", "maestro_agents.predict.live"} & {*loaded}


async def test_a_scheduler_of_its_own_predicts_by_a_model(
    redis_url: str, pool: str, good: LengthModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`maestro scheduler` brings the learner with the model that ships, and MAESTRO_RETRAIN=off keeps it from training."""
    monkeypatch.setattr(live, "default_model", lambda: good)
    monkeypatch.setenv("MAESTRO_RETRAIN", "off")
    fleet = Fleet(engines=(EngineSpec(engine_id="a", url="http://127.0.0.1:9/v1", model="m"),))
    task = asyncio.create_task(serve._schedule(fleet, redis_url, pool, "ours", Settings.load()))
    queue = RedisQueue(redis_url, pool=pool)
    try:
        async with asyncio.timeout(30):
            while not (told := await queue.predictor_status()):
                assert not task.done()
                await asyncio.sleep(0.05)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await queue.close()
    assert (json.loads(told)["version"], json.loads(told)["retrain"]) == ("good", False)
    assert json.loads(told)["prefix"] == {}
