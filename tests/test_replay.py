"""`simulator.recording` and `simulator.replay`: laws of playing a record again, and what is read from it."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_agents import policy, scheduler
from maestro_agents.core import EngineSpec, Observation, RunEnd, ServiceClass, Status
from maestro_agents.simulator import replay
from maestro_agents.simulator.recording import Engine, Follows, Recording, Run, Stage, record

T0 = 1_790_000_000.0
PACE_S = 0.004
DEADLINES_S = {ServiceClass.INTERACTIVE: 6.0, ServiceClass.BATCH: 60.0}


# -- a world to record -----------------------------------------------------------------------------------------------------
def engines(names="ab", *, slots=4, slowdown=0.0) -> dict[str, Engine]:
    found = [
        Engine(
            engine_id=n,
            model="m",
            slots=slots,
            slots_from="",
            slowdown=slowdown,
            pace_s=PACE_S,
            basis="engine",
            stages=0,
        )
        for n in names
    ]
    return {e.key: e for e in found}


def world(seed=0, *, runs=40, rate_per_s=2.5, **of_engines) -> Recording:
    """Runs of classify -> four look-ups beside each other -> draft -> review, as the demo's, arriving at random."""
    rng = random.Random(seed)
    fleet = engines(**of_engines)
    found: list[Run] = []
    at_s = T0
    for n in range(runs):
        at_s += rng.expovariate(rate_per_s)
        c = rng.choice(list(ServiceClass))
        shape = [("classify", (), 8), *((f"look{i}", (0,), 100) for i in range(4)), ("draft", (1, 2, 3, 4), 260), ("review", (5,), 12)]  # fmt: skip
        stages = [
            stage(f"{n}.{i}", f"run{n}", node, after, max(1, round(tokens * rng.lognormvariate(0, 0.3))), c, at_s, [*fleet][n % len(fleet)])
            for i, (node, after, tokens) in enumerate(shape)
        ]  # fmt: skip
        end = RunEnd(
            run_id=f"run{n}", workflow="w", outcome="done", started_at_s=at_s, ended_at_s=at_s, observed=True,
            service_class=c, deadline_at_s=at_s + DEADLINES_S[c],
        )  # fmt: skip
        found.append(
            Run(
                run_id=f"run{n}", started_at_s=at_s, stages=tuple(stages), end=end, ends=Follows(after=(6,), gap_s=0.01)
            )
        )
    return Recording(runs=tuple(found), engines=fleet, left_out={})


def stage(name, run, node, after, tokens, c, began_s, engine) -> Stage:
    seen = Observation(
        stage_id=name, run_id=run, workflow="w", role=node, node=node, model="m", engine_id=engine.split()[0],
        service_class=c, tenant="t", status=Status.DONE, prompt_tokens=100, output_tokens=tokens, observed=True,
        run_started_at_s=began_s, deadline_at_s=began_s + DEADLINES_S[c],
    )  # fmt: skip
    return Stage(seen=seen, engine=engine, due=Follows(after=after, gap_s=0.005), work_s=tokens * PACE_S)


def first_come(recording, **options):
    return asyncio.run(replay.first_come(recording, **options))


def maestro(recording, **options):
    return asyncio.run(replay.maestro(recording, **options))


def seen_in(recording: Recording, outcome: replay.Outcome, *, says="engine") -> list[Observation | RunEnd]:
    """What observing this outcome would have recorded. ``says``: what there is to tell an engine's queue by."""
    entries: list[Observation | RunEnd] = []
    for run in recording.runs:
        for s in run.stages:
            got = outcome.stages[s.seen.stage_id]
            told = {"engine_queue_s": got.wait_s, "engine_ttft_s": got.wait_s + 0.001} if says == "engine" else {}
            first_s = got.started_at_s + 0.001 if says == "stream" else got.ended_at_s
            entries.append(
                dataclasses.replace(
                    s.seen,
                    pushed_at_s=got.pushed_at_s,
                    granted_at_s=got.pushed_at_s,
                    first_byte_at_s=first_s,
                    finished_at_s=got.ended_at_s,
                    **told,
                )
            )
        if run.end:
            entries.append(dataclasses.replace(run.end, ended_at_s=outcome.ended_at_s[run.run_id]))
    return entries


def off_by(outcome: replay.Outcome, other: replay.Outcome, recording: Recording) -> float:
    took = sum(other.ended_at_s[r.run_id] - r.started_at_s for r in recording.runs)
    return sum(abs(outcome.ended_at_s[r] - other.ended_at_s[r]) for r in other.ended_at_s) / took


def met(recording: Recording, outcome: replay.Outcome, c: ServiceClass) -> int:
    return sum(outcome.ended_at_s[r.run_id] <= r.end.deadline_at_s for r in recording.runs if r.end.service_class is c)


both = pytest.mark.parametrize("play", [first_come, maestro])


# -- laws ----------------------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rate=st.floats(0.1, 20), slots=st.integers(1, 6), slow=st.floats(0, 0.5))
@pytest.mark.parametrize("play", [first_come, maestro])
def test_nothing_is_lost_and_nothing_begins_too_early(play, seed, rate, slots, slow):
    """Every stage ends once, after the gap behind what it followed; no engine runs more than its slots."""
    was = world(seed, runs=8, rate_per_s=rate, slots=slots, slowdown=slow)
    outcome = play(was)
    assert set(outcome.stages) == {s.seen.stage_id for r in was.runs for s in r.stages}
    assert set(outcome.ended_at_s) == {r.run_id for r in was.runs}
    for run in was.runs:
        got = [outcome.stages[s.seen.stage_id] for s in run.stages]
        for s, g in zip(run.stages, got, strict=True):
            ready_s = max((got[n].ended_at_s for n in s.due.after), default=run.started_at_s) + s.due.gap_s
            assert g.pushed_at_s == pytest.approx(ready_s, abs=1e-5)
            assert g.started_at_s >= g.pushed_at_s - 1e-5
            assert g.ended_at_s - g.started_at_s >= s.work_s - 1e-5
    changes = defaultdict(list)
    for g in outcome.stages.values():
        changes[g.engine] += [(g.started_at_s, 1), (g.ended_at_s, -1)]
    for found in changes.values():
        n = 0
        for _, change in sorted(found):
            n += change
            assert n <= slots


@both
def test_without_load_nothing_waits(play):
    """Runs that never meet take what their stages take, whoever stands before the engines."""
    was = world(rate_per_s=0.01)
    outcome = play(was)
    assert max(g.wait_s for g in outcome.stages.values()) == pytest.approx(0.0, abs=1e-5)
    alone = first_come(was, alone=True)
    assert outcome.ended_at_s == pytest.approx(alone.ended_at_s, abs=1e-4)


def test_an_engine_for_every_call_gives_the_longest_path():
    """First come first served without any bound is the unloaded time: work and gaps along the longest path."""
    was = world(rate_per_s=1000)
    outcome = first_come(was, alone=True)
    for run in was.runs:
        ends: list[float] = []
        for s in run.stages:
            ends.append(max((ends[n] for n in s.due.after), default=0.0) + s.due.gap_s + s.work_s)
        assert outcome.ended_at_s[run.run_id] - run.started_at_s == pytest.approx(ends[6] + 0.01, abs=1e-4)


@both
def test_the_same_record_gives_the_same_replay(play):
    """Nothing of the clock, the machine or chance is in it."""
    assert play(world(3)) == play(world(3))


@both
def test_no_runs_no_outcome(play):
    """An empty record is played to its end."""
    nothing = play(Recording(runs=(), engines={}, left_out={}))
    assert (nothing.ended_at_s, nothing.stages) == ({}, {})


@pytest.mark.parametrize(("together", "takes_s"), [(1, 1.0), (3, 1.5)])
def test_a_batch_slows_its_members_by_what_was_measured(together, takes_s):
    """With a slowdown of a quarter, three that run together take one and a half times as long."""
    fleet = engines("a", slots=8, slowdown=0.25)
    runs = [
        Run(run_id=f"r{n}", started_at_s=T0, stages=(stage(f"s{n}", f"r{n}", "x", (), 250, ServiceClass.BATCH, T0, "a m"),))
        for n in range(together)
    ]  # fmt: skip
    outcome = first_come(Recording(runs=tuple(runs), engines=fleet, left_out={}))
    assert [g.ended_at_s - g.started_at_s for g in outcome.stages.values()] == pytest.approx([takes_s] * together, abs=1e-4)  # fmt: skip


# -- Maestro in it is Maestro ---------------------------------------------------------------------------------------------
def test_the_scheduler_in_the_replay_is_the_scheduler(monkeypatch):
    """Its plan is `policy.plan`, its order the one that is named: no copy of either."""
    assert replay.Scheduler is scheduler.Scheduler
    plans, moments = [], []
    real = scheduler.plan
    monkeypatch.setattr(scheduler, "plan", lambda *a, **k: plans.append(1) or real(*a, **k))
    ours = policy.OURS.order
    maestro(world(), policy=policy.Policy(order=lambda *a: moments.append(a) or ours(*a)))
    assert plans
    assert moments


def test_under_load_interactive_runs_gain_and_nobody_pays_with_his_deadline():
    """What the replay is for: the same runs on the same engines, more of them in time."""
    was = world(1, rate_per_s=3.0, slots=3)
    before, after = first_come(was), maestro(was)
    assert met(was, after, ServiceClass.INTERACTIVE) > met(was, before, ServiceClass.INTERACTIVE)
    assert met(was, after, ServiceClass.BATCH) == met(was, before, ServiceClass.BATCH)


def test_maestro_does_not_know_what_is_to_come():
    """What ends before a run arrives does not depend on that run: nothing is learned from the future."""
    was = world(2, rate_per_s=4.0, slots=2)
    last = was.runs[-1]
    longer = [
        dataclasses.replace(s, work_s=9.0, seen=dataclasses.replace(s.seen, output_tokens=2250)) for s in last.stages
    ]
    other = dataclasses.replace(was, runs=(*was.runs[:-1], dataclasses.replace(last, stages=tuple(longer))))
    one, two = maestro(was).stages, maestro(other).stages
    early = {k for k, g in one.items() if g.ended_at_s < last.started_at_s}
    assert early
    assert {k: one[k] for k in early} == {k: two[k] for k in early}


def test_predictions_rest_on_what_has_ended_in_the_replay():
    """The first stage of a role is predicted from nothing, later ones from as many as have ended, and no more."""
    asked: list[tuple[float, str, str]] = []

    def order(ticket, prediction, now_s):
        asked.append((now_s, ticket.role, prediction.basis))
        return policy.OURS.order(ticket, prediction, now_s)

    was = world(4, rate_per_s=6.0, slots=2)
    roles = {s.seen.stage_id: s.seen.role for r in was.runs for s in r.stages}
    outcome = maestro(was, policy=policy.Policy(order=order))
    ended = [(g.ended_at_s, roles[k]) for k, g in outcome.stages.items()]
    for now_s, role, basis in asked:
        known = sum(at_s <= now_s and r == role for at_s, r in ended)
        assert basis == (f"role({known})" if known else "prior")


# -- what is read from a record ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("says", "slowdown", "tolerance"),
    [("engine", 0.0, 0.02), ("engine", 0.1, 0.05), ("stream", 0.0, 0.02), ("nothing", 0.0, 0.05)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_was_first_come_first_served_is_found_again(says, slowdown, tolerance, seed):
    """From a record alone (who followed whom, how long each worked, how many slots) comes the replay that was recorded."""
    was = world(seed, rate_per_s=3.0, slots=3, slowdown=slowdown)
    outcome = first_come(was)
    found = replay.calibrated(record(seen_in(was, outcome, says=says)))
    assert [e.slots for e in found.engines.values()] == [3, 3]
    assert off_by(first_come(found), outcome, was) <= tolerance


def test_what_maestro_would_gain_is_found_from_the_record_alone():
    """The record of first come first served gives the same replay under Maestro as the world itself."""
    was = world(5, rate_per_s=3.0, slots=3)
    found = replay.calibrated(record(seen_in(was, first_come(was))))
    assert off_by(maestro(found), maestro(was), was) < 0.15


def test_a_stage_follows_what_had_ended_when_it_began():
    """The four look-ups follow the classification, the draft all four, the review the draft."""
    was = world(runs=5)
    found = record(seen_in(was, first_come(was)))
    assert [[s.due.after for s in r.stages] for r in found.runs] == [[s.due.after for s in r.stages] for r in was.runs]
    assert [r.ends.after for r in found.runs] == [(6,)] * 5


@pytest.mark.parametrize(
    ("options", "slots", "source"),
    [
        ({}, 3, "what it ran while calls queued there"),
        ({"slots": 7}, 7, "--slots"),
        ({"fleet": [EngineSpec(engine_id="a", url="http://x", model="m", slots=9)]}, 9, "the fleet"),
        ({"fleet": [EngineSpec(engine_id="z", url="http://x", model="m", slots=9)]}, 3, "what it ran while calls queued there"),
    ],
)  # fmt: skip
def test_slots_are_named_or_estimated_and_it_is_said_how(options, slots, source):
    """The fleet file counts for the engines that it names, then ``--slots``, then what the record shows."""
    was = world(names="a", rate_per_s=3.0, slots=3)
    (engine,) = record(seen_in(was, first_come(was)), **options).engines.values()
    assert (engine.slots, engine.slots_from) == (slots, source)


def test_an_observed_url_is_an_engine_of_the_fleet_file():
    """Observed calls name their engine by its URL: the fleet file's entry with that URL is meant."""
    was = world(names="a", rate_per_s=3.0, slots=3)
    entries = [
        dataclasses.replace(e, engine_id="m@http://h:1/v1/") if isinstance(e, Observation) and n % 2 else e
        for n, e in enumerate(seen_in(was, first_come(was)))
    ]
    fleet = [EngineSpec(engine_id="a", url="http://h:1/v1", model="m", slots=5)]
    assert len(record(entries).engines) == 2
    assert [(e.engine_id, e.slots, e.stages) for e in record(entries, fleet=fleet).engines.values()] == [("a", 5, 280)]


def test_calls_that_took_no_time_are_not_waited_for_by_themselves():
    """A coarse clock gives calls that began and ended in one moment: they are played like all others."""
    was = world(runs=3)
    entries = [
        dataclasses.replace(e, pushed_at_s=float(int(e.pushed_at_s)), granted_at_s=float(int(e.pushed_at_s)), finished_at_s=float(int(e.finished_at_s)))
        if isinstance(e, Observation) else e for e in seen_in(was, first_come(was), says="nothing")
    ]  # fmt: skip
    found = replay.calibrated(record(entries))
    for outcome in (first_come(found), maestro(found)):
        assert len(outcome.stages) == 21
        assert len(outcome.ended_at_s) == 3


def test_an_engine_that_was_never_full_has_the_slots_that_were_seen():
    """Where nothing queued, the most that ran at a time is all that can be known, and it is said."""
    was = world(rate_per_s=0.5, slots=64)
    for says in ("engine", "nothing"):
        found = replay.calibrated(record(seen_in(was, first_come(was), says=says)))
        assert all("the most" in e.slots_from for e in found.engines.values())
        assert max(g.wait_s for g in first_come(found).stages.values()) == pytest.approx(0.0, abs=0.01)


def test_what_cannot_be_is_left_out_and_counted():
    """A call that ended before it began, one that no engine began, a run that ended before it began."""
    was = world(runs=3)
    entries = seen_in(was, first_come(was))
    first = entries[0]
    broken = [
        dataclasses.replace(first, stage_id="x", finished_at_s=first.pushed_at_s - 5),
        dataclasses.replace(first, stage_id="y", finished_at_s=0.0),
        dataclasses.replace(entries[7], run_id="z", ended_at_s=T0 - 5),
    ]
    found = record([*entries, *broken])
    assert sum(found.left_out.values()) == 3
    assert len(found.left_out) == 3
    assert sum(len(r.stages) for r in found.runs) == 21


def test_a_run_without_an_end_is_load_and_nothing_more():
    """Its calls occupy the engine; no completion is made up for it. So for calls outside any run."""
    was = world(runs=4)
    entries = seen_in(was, first_come(was))
    lone = dataclasses.replace(entries[0], stage_id="lone", run_id="")
    found = record([*(e for e in entries if not (isinstance(e, RunEnd) and e.run_id == "run2")), lone])
    for outcome in (first_come(found), maestro(found)):
        assert set(outcome.ended_at_s) == {"run0", "run1", "run3"}
        assert len(outcome.stages) == 29


def test_a_run_that_paused_is_the_run_that_ended():
    """An interrupt's end is no end; the last word counts, in whatever order the lines come."""
    was = world(runs=1)
    *calls, end = seen_in(was, first_come(was))
    paused = dataclasses.replace(end, outcome="paused", ended_at_s=end.ended_at_s - 0.2)
    for entries in ([*calls, paused, end], [end, paused, *calls]):
        (run,) = record(entries).runs
        assert run.end == end
