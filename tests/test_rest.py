"""What a run still writes after each of its calls: learned from ends of runs, said where a model knows better than `Workflows`."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import json
import logging
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from maestro_agents.cli import main
from maestro_agents.cli.predict import live as view
from maestro_agents.core import Observation, RunEnd, Status, Ticket
from maestro_agents.errors import ModelUnusable
from maestro_agents.ports import Queue
from maestro_agents.predict import live, rest, trainer
from maestro_agents.predict.length import LengthModel, joined, split, train
from maestro_agents.predict.live import Learner, Trial
from maestro_agents.predict.rest import OpenRuns
from maestro_agents.predict.roles import Estimate, corrected
from maestro_agents.predict.trainer import Job, Row, Verdict, fitted
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.scheduler import Scheduler
from maestro_agents.simulator import foresight
from maestro_agents.simulator.sessions import end_of
from maestro_agents.workflow import Remaining, Workflows
from tests.queues import fresh_redis_queue
from tests.test_trainer import ENGINE, NOW_S, Clock, ended, messages, tended, vector, verdict, world

RUNS = 80
Entry = Observation | RunEnd


def run_of(n: int, *, asked: int | None = None, outcome: str = "done", odd: bool = False, **more: Any) -> list[Entry]:
    """A run of calls of a hundred tokens each: its prompts ask for few words and one call follows, or for many and five do."""
    asked = asked if asked is not None else (5, 160)[n % 2]
    calls = 6 if (asked > 50) is not odd else 2
    at_s = NOW_S + 100 * n
    log: list[Entry] = [
        ended(
            asked,
            95 + (7 * n + 3 * i) % 11,
            run_id=f"run{n}",
            stage_id=f"run{n}-{i}",
            visit=i,
            pushed_at_s=at_s + 2 * i,
            granted_at_s=at_s + 2 * i,
            finished_at_s=at_s + 2 * i + 1,
            **more,
        )
        for i in range(calls)
    ]
    return [*log, RunEnd(run_id=f"run{n}", workflow="w", outcome=outcome, started_at_s=at_s, ended_at_s=at_s + 50)]


def runs(n: int, *, start: int = 0, odd: bool = False) -> list[Entry]:
    return [e for i in range(start, start + n) for e in run_of(i, odd=odd)]


def rest_rows(entries: Iterable[Entry]) -> list[Row]:
    """What is trained on, of a log."""
    learner = taught(Learner(), entries)
    learner._learn_rests()
    return learner.rest.rows.latest()


def rest_model(*, odd: bool = False) -> LengthModel:
    rows = rest_rows(runs(RUNS, odd=odd))
    return train([trainer.example(row) for row in rows], version="odd" if odd else "rests", trained_at="long ago")


@pytest.fixture(scope="module")
def rests() -> LengthModel:
    """A model of what these runs still write."""
    return rest_model()


@pytest.fixture(scope="module")
def odd() -> LengthModel:
    """A model of runs that do the opposite."""
    return rest_model(odd=True)


@pytest.fixture(scope="module")
def lengths() -> LengthModel:
    """A model of output lengths."""
    rows = [Row.of(e, o.finished_at_s) for o in world(400) if (e := trainer.example_of(o))]
    return train([trainer.example(row) for row in rows], version="good", trained_at="long ago")


@pytest.fixture
async def queue(redis_url: str) -> AsyncIterator[RedisQueue]:
    """A real Redis."""
    found = await fresh_redis_queue(redis_url)
    yield found
    await found.close()


def scheduler_of(learner: Learner, queue: Queue | None = None, clock: Clock | None = None) -> Scheduler:
    return Scheduler(queue or MemoryQueue(), [ENGINE], clock=clock or Clock(), holder="s", predictor=learner)


def taught(learner: Learner, entries: Iterable[Entry], scheduler: Scheduler | None = None) -> Learner:
    """The learner after a scheduler took these entries of its log."""
    (scheduler or scheduler_of(learner)).take(*entries)
    return learner


def waiting(asked: int = 160, **more: Any) -> Ticket:
    known: dict[str, Any] = {
        "stage_id": "w",
        "client_id": "c",
        "run_id": "r",
        "model": "m",
        "role": "app:writer",
        "workflow": "w",
        "node": "n",
        "visit": 0,
        "prompt_tokens": 100,
        "features": vector(prompt_tokens=100, last_asked_words=asked),
    }
    return Ticket(**{**known, **more})


def left(scheduler: Scheduler, asked: int = 160, **more: Any) -> Any:
    """What a scheduler says of a waiting stage."""
    learner: Any = scheduler.predictor
    learner._estimates.clear()
    return scheduler.predict([waiting(asked, **more)])["w"]


# -- what is counted -----------------------------------------------------------------------------------------------------
def test_each_call_of_a_run_is_an_example_of_what_the_run_wrote_after_it() -> None:
    """Tokens that came later, whether none did, and when that was known: features and names stay the call's."""
    rows = rest_rows(run_of(0, asked=160))
    calls = [o for o in run_of(0, asked=160) if isinstance(o, Observation)]
    written = [o.output_tokens for o in calls]
    assert [r.output_tokens for r in rows] == [sum(written[i + 1 :]) for i in range(6)]
    assert [r.short for r in rows] == [False] * 5 + [True]
    assert {r.ended_at_s for r in rows} == {NOW_S + 50}
    assert [trainer.example(r).features for r in rows] == [o.features for o in calls]


def test_calls_beside_each_other_are_no_part_of_each_others_rest() -> None:
    """Of two siblings and a join each counts the join alone."""
    moments = [(0.0, 1.0), (1.0, 2.0), (1.0, 3.0), (3.0, 4.0)]
    log: list[Entry] = [
        ended(10, 10**i, run_id="r", stage_id=f"s{i}", visit=i, pushed_at_s=a, granted_at_s=a, finished_at_s=b)
        for i, (a, b) in enumerate(moments)
    ]
    end = RunEnd(run_id="r", workflow="w", outcome="done", started_at_s=0.0, ended_at_s=5.0)
    assert [r.output_tokens for r in rest_rows([*log, end])] == [1_110, 1_000, 1_000, 0]


@pytest.mark.parametrize("outcome", ["error", "cancelled"])
def test_a_run_that_did_not_end_well_teaches_nothing_and_is_forgotten(outcome: str) -> None:
    """Half a run is no run's rest."""
    learner = taught(Learner(), run_of(0, outcome=outcome))
    assert (len(learner.open), learner._ended) == (0, [])


def test_a_paused_run_goes_on_and_calls_made_again_do_not_count() -> None:
    """What came before the pause has what came after it as its rest; a replayed call and a failed one wrote nothing new."""
    calls, end = run_of(0, asked=160)[:-1], run_of(0, asked=160)[-1]
    assert isinstance(end, RunEnd)
    assert isinstance(calls[0], Observation)
    again = [
        dataclasses.replace(calls[0], stage_id="again", replayed=True),
        dataclasses.replace(calls[0], stage_id="failed", status=Status.FAILED),
    ]
    paused = dataclasses.replace(end, outcome="paused", ended_at_s=1.0)
    rows = rest_rows([*calls[:3], paused, *again, *calls[3:], end])
    assert rows == rest_rows([*calls, end])


def test_calls_of_runs_that_go_on_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that began first is forgotten; of a very long one the first calls are kept; ended runs leave nothing."""
    monkeypatch.setattr(rest, "MAX_OPEN_CALLS", 10)
    monkeypatch.setattr(rest, "MAX_STAGES", 4)
    learner = Learner()
    logs = [run_of(n, asked=160) for n in range(50)]
    for log in logs:
        learner.observe([o for o in log if isinstance(o, Observation)])
        assert len(learner.open) <= 10
    assert len(learner.open) == 8
    ends = [log[-1] for log in logs]
    for end in ends:
        assert isinstance(end, RunEnd)
        learner.end_run(end, Workflows())
    assert (len(learner.open), len(learner._ended)) == (0, 8)
    for n in range(100, 1_000):
        learner.observe([ended(run_id=f"never-ends-{n}", pushed_at_s=NOW_S, finished_at_s=NOW_S + 1)])
    assert len(learner.open._runs) <= 10


def test_workflows_are_judged_by_what_they_knew_before_the_run() -> None:
    """Of the first run nothing was known; of the second, what the first did."""
    learner = Learner()
    scheduler = scheduler_of(learner)
    taught(learner, run_of(0, asked=160), scheduler)
    taught(learner, run_of(2, asked=160), scheduler)
    known = [told.known_tokens for told in learner._ended]
    assert known[:6] == [0.0] * 6
    assert known[6] > 50


def test_a_call_without_a_run_is_not_remembered() -> None:
    """Nothing will ever say that it ended."""
    open_runs = OpenRuns()
    open_runs.add(ended(run_id=""), None)
    open_runs.add(ended(pushed_at_s=NOW_S + 9e9), None)
    assert len(open_runs) == 0


# -- what is said --------------------------------------------------------------------------------------------------------
def test_what_is_known_is_corrected_by_the_models_tokens() -> None:
    """Tokens are the model's; calls, prompts and seconds go with them; the chance of the end is its own; slack stays."""
    known = Remaining(
        stages=4.0,
        output_tokens=400.0,
        prompt_tokens=800.0,
        llm_s=8.0,
        tool_s=2.0,
        ends_p=0.2,
        slack_s=1.5,
        n=9,
    )
    said = Estimate(mean=0, p50=100.0, p90=0, p99=0, short_p=0.7)
    expected = Remaining(
        stages=1.0,
        output_tokens=100.0,
        prompt_tokens=200.0,
        llm_s=2.0,
        tool_s=0.5,
        ends_p=0.7,
        slack_s=1.5,
        n=9,
    )
    assert corrected(known, said) == expected
    assert corrected(known, Estimate(mean=0, p50=100.0, p90=0, p99=0)) == known  # no model speaks
    new = corrected(Remaining(), said, decode_s_per_token=0.02)
    assert (new.output_tokens, new.llm_s, new.stages) == (100.0, 2.0, 0.0)


def test_a_run_that_looks_long_has_more_left_than_one_that_looks_short(rests: LengthModel) -> None:
    """The same node at the same visit, which is all that `Workflows` know; what has no usable features has their answer."""
    learner = Learner()
    scheduler = scheduler_of(learner)
    taught(learner, runs(RUNS), scheduler)
    plain = left(scheduler)
    assert plain.remaining_tokens == left(scheduler, 5).remaining_tokens == pytest.approx(300, rel=0.1)
    learner._learn_rests()
    learner.rest.adopt(rests, "rests", b"", on_trial=False)
    long, short = left(scheduler, 160), left(scheduler, 5)
    assert long.remaining_tokens > 1.2 * plain.remaining_tokens
    assert short.remaining_tokens < 0.6 * plain.remaining_tokens
    for name in ("remaining_s", "remaining_stages"):
        assert getattr(long, name) / getattr(short, name) == pytest.approx(
            long.remaining_tokens / short.remaining_tokens
        )
    assert long.output_tokens_p50 == plain.output_tokens_p50
    assert left(scheduler, features=()).remaining_tokens == plain.remaining_tokens
    assert left(scheduler, run_id="").remaining_tokens == plain.remaining_tokens


def test_where_the_model_is_worse_than_workflows_they_speak(odd: LengthModel) -> None:
    """In that role alone, and after some ten calls; the status says so."""
    learner = Learner()
    scheduler = scheduler_of(learner)
    taught(learner, runs(RUNS), scheduler)
    learner._learn_rests()
    plain = left(scheduler).remaining_tokens
    learner.rest.adopt(odd, "odd", b"", on_trial=False)
    assert left(scheduler).remaining_tokens < 0.7 * plain
    taught(learner, runs(20, start=RUNS), scheduler)
    learner._learn_rests()
    assert left(scheduler).remaining_tokens == pytest.approx(plain, rel=0.1)
    (role,) = learner.status()["rest"]["roles"]
    assert (role["role"], role["uses"]) == ("app:writer", "workflow")
    assert role["mae_said"] > role["mae_workflow"] > 0


def test_the_live_scheduler_says_what_the_simulator_foresees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same runs learned from, the same calls asked about: the same tokens, calls and chance of the end."""
    monkeypatch.setattr(foresight, "FOLDS", 2)
    rng = random.Random(1)
    trace = tmp_path / "trace.csv"
    with trace.open("w", newline="") as out:
        table = csv.writer(out)
        names = ("app", "session_id", "task_id", "call_index", "role", "model", "input_tokens", "output_tokens")
        table.writerow((*names, "parents"))
        for task in range(40):
            for n in range(6 if task % 2 else 2):
                prompt = (5_000 if task % 2 else 500) + 100 * n + rng.randint(0, 50)
                table.writerow(
                    ("shop", f"t{task:02}", f"t{task:02}", n, "agent", "m", prompt, rng.randint(80, 120), "")
                )
    foreseen = foresight.foresee(trace)
    known = foresight._read(trace, None, 0)
    seen, asked = next(known.parts())
    learner = Learner()
    scheduler = scheduler_of(learner)
    for run in dict.fromkeys(known.run_of[i] for i in seen):
        calls = [i for i in seen if known.run_of[i] == run]
        log = [
            dataclasses.replace(
                o,
                run_id=f"t{run:02}",  # in their order of names runs are dealt into folds
                role=known.examples[i].role,
                model=known.examples[i].model,
                features=known.examples[i].features,
                **{name: getattr(o, name) + 1e6 * run for name in ("pushed_at_s", "granted_at_s", "finished_at_s")},
            )
            for o, i in zip(known.played[run], calls, strict=True)
        ]
        end = end_of(log, started_at_s=0.0, ended_at_s=log[-1].finished_at_s)
        taught(learner, [*log, end], scheduler)
    learner._learn_rests()
    model = train([trainer.example(r) for r in learner.rest.rows.latest()], seed=0)
    learner.rest.adopt(model, "same", b"", on_trial=False)
    for i in asked:
        call, example = known.calls[i], known.examples[i]
        said = foreseen["shop", call.session_id][call.call_index]
        t = waiting(workflow="shop", node="agent", role=example.role, visit=example.visit)
        t = t.evolve(features=example.features, prompt_tokens=example.prompt_tokens)
        learner._estimates.clear()
        p = scheduler.predict([t])["w"]
        assert p.remaining_tokens == pytest.approx(said.output_tokens, rel=0.01, abs=0.01)
        assert p.remaining_stages == pytest.approx(said.stages, rel=0.01, abs=0.01)
        assert p.ends_p == pytest.approx(said.ends_p, abs=0.01)


def test_bench_remaining_says_what_the_second_model_adds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Error and rank agreement of the means, of the running median and of the model; of too few calls to train on, the means."""
    trace = tmp_path / "trace.csv"
    rows = [f"shop,s{task},t{task},{n},agent,m,{100 * n},{100},\n" for task in range(8) for n in range(2 + task % 2)]
    trace.write_text(
        "app,session_id,task_id,call_index,role,model,input_tokens,output_tokens,parents\n" + "".join(rows)
    )
    with pytest.raises(SystemExit) as end:
        main(["bench", "remaining", str(trace), "--model", "--json"])
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["calls"], [r["predictor"] for r in found["rows"]]) == (20, ["workflows", "median", "model"])
    means, median, model = found["rows"]
    assert 0 < means["mae"] < 100
    assert means["tau"] > 0
    assert {**model, "predictor": "workflows"} == means
    assert median["mae"] != means["mae"]
    with pytest.raises(SystemExit):
        main(["bench", "remaining", str(trace), "--model"])
    assert "the second model" in capsys.readouterr().out


def test_a_bug_in_the_second_model_breaks_nothing(
    lengths: LengthModel, rests: LengthModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lengths go on by their model, the rest of runs by `Workflows`, learning by statistics; each bug is told once."""
    learner = Learner(lengths)
    scheduler = scheduler_of(learner)
    taught(learner, runs(20), scheduler)
    plain = left(scheduler)
    learner.rest.adopt(rests, "rests", b"", on_trial=False)

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(learner.rest.predictor.model, "predict", broken)
    for _ in range(2):
        said = left(scheduler)
        assert (said.remaining_tokens, said.basis) == (plain.remaining_tokens, plain.basis)
    for n in (20, 21):
        taught(learner, run_of(n), scheduler)
        asyncio.run(tended(learner, MemoryQueue(), epoch=None, now_s=NOW_S + 10 * n))
    monkeypatch.setattr(OpenRuns, "end", broken)
    taught(learner, run_of(22), scheduler)
    monkeypatch.setattr(OpenRuns, "add", broken)
    taught(learner, run_of(23), scheduler)
    assert len(learner.lengths.rows) == sum(isinstance(e, Observation) for e in runs(24))
    known = scheduler.workflows.remaining(waiting()).n
    assert known > plain.remaining_stages > 0
    assert messages(caplog, logging.ERROR) == [
        "a bug (predicting the rest of runs); statistics go on",
        "a bug (learning the rest of runs); statistics go on",
        "a bug (remembering calls); statistics go on",
    ]


def test_the_rest_of_a_waiting_stage_is_not_asked_again_in_each_second(rests: LengthModel) -> None:
    """It is learned from ends of runs alone, and costs as much as the stage's own length; who else is asked about changes nothing."""
    learner = Learner()
    learner.rest.adopt(rests, "rests", b"", on_trial=False)
    asked: list[int] = []
    real = learner.rest.predictor.estimate

    def spy(stages: Sequence[Any]) -> list[Estimate]:
        asked.append(len(stages))
        return real(stages)

    learner.rest.predictor.estimate = spy  # type: ignore[method-assign, assignment]
    for second in range(6):
        learner._now_s = NOW_S + 1.01 * second
        learner.predict([waiting(), waiting(stage_id="x")], {"m": ENGINE}, Workflows())
        learner.predict([waiting(stage_id="x")], {"m": ENGINE}, Workflows())
    assert [n for n in asked if n] == [2, 2]


# -- as a file -----------------------------------------------------------------------------------------------------------
def test_who_knows_of_one_model_reads_the_first_of_two(lengths: LengthModel, rests: LengthModel) -> None:
    """A scheduler of a former version goes on; one that knows of both reads both, in all combinations."""
    both = joined(lengths.encode(), rests.encode())
    assert LengthModel.decode(both).card == lengths.card
    for first in (lengths.encode(), b""):
        for second in (rests.encode(), b""):
            found = split(joined(first, second))
            for part, was in zip(found, (first, second), strict=True):
                assert bool(part) is bool(was)
                if was:
                    assert LengthModel.decode(part).card == LengthModel.decode(was).card
    with pytest.raises(ModelUnusable):  # refused by who knows of one: the model in use stays there
        LengthModel.decode(joined(b"", rests.encode()))
    assert split(b"no model at all") == (b"no model at all", b"")


# -- whether it is better ------------------------------------------------------------------------------------------------
def test_what_reserves_no_memory_is_not_judged_by_what_its_p90_covers() -> None:
    """Where runs are alike everything stays below it."""
    assert verdict(covered_p90=1.0, tested=4_000).against
    assert not verdict(covered_p90=1.0, tested=4_000, reserves=False).against
    assert verdict(mae=79.5, current_mae=90.0, reserves=False).against


def test_a_candidate_is_asked_about_all_calls_of_a_run_before_one_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """They became known together, when the run ended."""
    monkeypatch.setattr(trainer, "BATCH", 4)
    asked: list[list[str]] = []
    real = trainer.Predictor.estimate

    def spy(self: Any, stages: Any, raw: Any = None) -> Any:
        asked.append([s.session for s in stages])
        return real(self, stages, raw)

    monkeypatch.setattr(trainer.Predictor, "estimate", spy)
    trainer._live(trainer.Predictor(None), rest_rows(runs(6)))
    assert [len(batch) for batch in asked] == [8, 8, 8]
    together = [session for batch in asked for session in set(batch)]
    assert len(together) == len(set(together)) == 6


# -- the life of a model -------------------------------------------------------------------------------------------------
async def test_a_pool_learns_what_its_runs_still_write_and_all_schedulers_take_it_over(
    queue: RedisQueue, lengths: LengthModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the log of a real Redis, in another process; published beside the lengths, which stay; a restart rebuilds all of it."""
    monkeypatch.setattr(live, "RETRAIN_ROWS", 300)
    clock, learner, standby = Clock(), Learner(lengths), Learner(lengths)
    learner.lengths.train_at_s = float("inf")  # this test is about the other part
    scheduler = scheduler_of(learner, queue, clock)
    assert await scheduler.lead()
    for entry in runs(RUNS):
        await (queue.end_run(entry) if isinstance(entry, RunEnd) else queue.observe(entry))
    await standby.tend(queue, epoch=None, now_s=clock.at_s, more=dict)
    await scheduler.step()
    for _ in range(2):
        clock.at_s += 1.1
        await scheduler.step()
        await asyncio.gather(*learner._tasks.values())
    assert learner.rest.verdict is not None
    assert learner.rest.verdict.mae < 0.5 * learner.rest.verdict.median_mae
    assert learner.version.startswith("good+live-2026")
    assert [*await queue.models()] == [learner.version, "good"]
    assert (learner.lengths.trial, learner.rest.trial is None) == (None, False)

    await tended(standby, queue, epoch=None, now_s=clock.at_s + 10)
    assert (standby.version, standby.predictor.model) == (learner.version, standby.predictor.model)
    found = await queue.model("")
    assert found is not None
    assert LengthModel.decode(found[1]).card == lengths.card  # an older scheduler

    late = Learner(lengths)
    restarted = scheduler_of(late, queue, clock)
    clock.at_s += 60  # the first one's leadership has ended
    assert await restarted.lead()
    await restarted.step()
    clock.at_s += 1.1
    await restarted.step()
    assert late.version == learner.version
    assert len(late.rest.rows) == len(learner.rest.rows) == sum(isinstance(e, Observation) for e in runs(RUNS))
    assert late.rest.new_rows == 0
    for asked in (5, 160):
        again, before = left(restarted, asked), left(scheduler, asked)
        assert again.remaining_tokens == pytest.approx(before.remaining_tokens, rel=0.02)
    assert left(restarted, 160).remaining_tokens > 3 * left(restarted, 5).remaining_tokens


async def test_a_second_model_that_turns_out_worse_is_taken_back_and_the_first_stays(
    queue: RedisQueue, lengths: LengthModel, rests: LengthModel, odd: LengthModel, caplog: pytest.LogCaptureFixture
) -> None:
    """One file holds both, each publication changes one: what is taken back is what was worse."""
    learner, standby = Learner(lengths), Learner(lengths)
    scheduler = scheduler_of(learner)
    await queue.publish_model("good+rests", card="{}", data=joined(lengths.encode(), rests.encode()), epoch=0)
    for who in (learner, standby):
        await tended(who, queue, epoch=None)
    first = learner.predictor
    await queue.publish_model("good+odd", card="{}", data=joined(lengths.encode(), odd.encode()), epoch=0)
    await tended(learner, queue, now_s=NOW_S + 10)
    await tended(standby, queue, epoch=None, now_s=NOW_S + 10)
    assert learner.version == standby.version == "good+odd"
    assert learner.predictor is first
    n = live.TRIAL_STAGES // 4 + 1  # four calls a run on average
    taught(learner, runs(n), scheduler)
    await tended(learner, queue, now_s=NOW_S + 20)
    await tended(learner, queue, now_s=NOW_S + 30)
    await tended(standby, queue, epoch=None, now_s=NOW_S + 40)
    assert learner.version == standby.version == "good+rests"
    assert learner.predictor is first
    assert [*await queue.models()] == ["good+rests", "good+odd"]
    assert [(r["from"], r["to"]) for r in learner.rollbacks] == [("good+odd", "good+rests")]
    assert [m for m in messages(caplog) if "good+rests predicts again" in m]


async def test_the_first_model_is_taken_back_without_the_second(
    queue: RedisQueue, lengths: LengthModel, rests: LengthModel
) -> None:
    """The other way round: the version names what is in the file."""
    learner = Learner(lengths)
    await tended(learner, queue)
    other = LengthModel.decode(lengths.encode())
    other.card = dataclasses.replace(other.card, version="other")
    await queue.publish_model("other+rests", card="{}", data=joined(other.encode(), rests.encode()), epoch=0)
    await tended(learner, queue, now_s=NOW_S + 10)
    assert learner.lengths.trial is not None
    learner.lengths.trial = Trial(
        former=learner.lengths.trial.former, version="good", data=None, n=live.TRIAL_STAGES, error=9e9
    )
    await tended(learner, queue, now_s=NOW_S + 20)
    found = await queue.model("")
    assert found is not None
    assert found[0] == learner.version == "good+rests"
    assert [LengthModel.decode(f).card.version for f in split(found[1])] == ["good", "rests"]


async def test_each_part_is_trained_by_itself(lengths: LengthModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, each when enough of its own is new; what comes of one leaves the other as it is."""
    asked: list[Job] = []

    async def trained(job: Job) -> tuple[Verdict, bytes]:
        asked.append(job)
        return verdict(reserves=job.reserves), b""

    monkeypatch.setattr(trainer, "train_apart", trained)
    monkeypatch.setattr(live, "RETRAIN_ROWS", 20)
    learner, queue = Learner(lengths), MemoryQueue()
    await tended(learner, queue)
    taught(learner, runs(5))
    calls = sum(isinstance(e, Observation) for e in runs(5))
    assert calls < 20
    taught(learner, [e for e in runs(9, start=5) if isinstance(e, Observation)])  # these runs go on
    for second in range(3):
        await tended(learner, queue, now_s=NOW_S + 2 * second)
    assert [job.reserves for job in asked] == [True]
    taught(learner, [e for e in runs(9, start=5) if isinstance(e, RunEnd)])
    for second in range(3):
        await tended(learner, queue, now_s=NOW_S + 10 + 2 * second)
    assert [job.reserves for job in asked] == [True, False]
    assert len(asked[1].rows) == sum(isinstance(e, Observation) for e in runs(14))
    assert learner.version == "good"


def test_a_candidate_for_the_rest_of_runs_is_trained_as_one_for_lengths() -> None:
    """Judged by the newest runs, beside the running median of the role."""
    found, data = fitted(Job(rows=rest_rows(runs(RUNS)), version="v", trained_at="", reserves=False))
    assert not found.against
    assert found.mae < 0.5 * found.median_mae
    assert LengthModel.decode(data).card.version == "v"
    assert not json.loads(json.dumps(found.to_json()))["reserves"]


def test_status_shows_the_second_models_error_in_the_same_words(rests: LengthModel) -> None:
    """By role: its error beside that of `Workflows`, what stayed below its p90, which of the two is used; before a model: that there is none."""
    learner = taught(Learner(), runs(10))
    learner._learn_rests()
    assert "no model yet" in shown(learner)
    learner.rest.adopt(rests, "rests", b"", on_trial=False)
    assert "No run has ended since" in shown(learner)
    taught(learner, runs(30, start=10))
    learner._learn_rests()
    page = shown(learner)
    for part in ("after a call, by rests", "workflow's", "app:writer", "below p90"):
        assert part in page


def shown(learner: Learner) -> str:
    from io import StringIO

    from rich.console import Console

    console = Console(width=200, record=True, file=StringIO())
    console.print(view.status_view(learner.status()))
    return console.export_text()
