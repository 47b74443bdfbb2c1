"""The laws of the simulation: what holds for any workload, fleet and policy."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_agents import policy, scheduler
from maestro_agents.cli.bench import scale
from maestro_agents.core import EngineSpec, ServiceClass, Ticket
from maestro_agents.policy import LIVE, POLICIES, Knows, Policy, Snapshot
from maestro_agents.simulator import world
from maestro_agents.simulator.engine import EngineProfile
from maestro_agents.simulator.hardware import SimEngine
from maestro_agents.simulator.workload import Foreseen, Run, Stage, Workload
from maestro_agents.simulator.world import EVENTS, Event, Outage, World
from tests.queues import fresh_redis_queue

PROFILE = EngineProfile(max_num_seqs=8, num_blocks=512, max_model_len=2048)
SHORT_OF_KV = EngineProfile(max_num_seqs=8, num_blocks=80, max_model_len=1024)
"""Its KV memory is full before its slots are."""


def fleet(
    n: int = 2,
    *,
    slots: int = 4,
    models: tuple[str, ...] = ("m",),
    rtt_s: float = 0.0,
    profile: EngineProfile = PROFILE,
) -> list[SimEngine]:
    return [
        SimEngine(
            spec=EngineSpec(
                engine_id=f"{model}{i}", url="", model=model, slots=slots, kv_bytes=profile.kv_tokens, kv_bytes_per_token=1,
                kv_block_tokens=16, max_model_len=profile.max_model_len, cluster=f"c{i}", rtt_s=rtt_s, decode_s_per_token=0.008,
                prefill_s_per_token=0.0001,
            ),
            profile=profile,
        )
        for model in models
        for i in range(n)
    ]  # fmt: skip


def foreseen(tokens: float) -> Foreseen:
    return Foreseen(
        output_tokens_mean=tokens, output_tokens_p50=tokens, output_tokens_p90=2 * tokens, output_tokens_p99=4 * tokens,
        stages=1, output_tokens=tokens, prompt_tokens=100,
    )  # fmt: skip


def workload(
    seed: int, runs: int = 20, *, every_s: float = 0.3, models: tuple[str, ...] = ("m",), told: bool = True
) -> Workload:
    """Chains, fan-outs and joins of random sizes; predictions that are wrong by up to four times."""
    rng = random.Random(seed)
    made: list[Run] = []
    for i in range(runs):
        stages: list[Stage] = []
        for n in range(rng.randint(1, 6)):
            after = tuple(sorted(rng.sample(range(n), rng.randint(1, min(n, 2))))) if n else ()
            tokens = rng.randint(1, 150)
            stages.append(
                Stage(
                    role=f"app:{n % 3}", model=rng.choice(models), prompt_tokens=rng.randint(1, 600), output_tokens=tokens,
                    after=after, gap_s=rng.choice((0.0, 0.0, 0.4)), visit=n // 3,
                    foreseen=foreseen(tokens * rng.uniform(0.25, 4.0)) if told else None,
                )
            )  # fmt: skip
        made.append(
            Run(
                run_id=f"r{i}", app="app", session=f"s{i}", at_s=i * every_s, deadline_s=rng.choice((2.0, 6.0, 30.0)),
                service_class=rng.choice(list(ServiceClass)), stages=tuple(stages), tenant=rng.choice("ab"),
            )
        )  # fmt: skip
    end_s = runs * every_s
    return Workload(name="random", runs=tuple(made), warmup_s=0.0, window_s=end_s, horizon_s=end_s + 1e4)


def play(w: Workload, engines: list[SimEngine], p: Policy, **more: Any) -> list[Event]:
    events: list[Event] = []
    World(w, engines, p, tell=events.append, **more).play()
    return events


def met(events: list[Event]) -> float:
    due = {e[2]: e[6] for e in events if e[0] == "run"}
    done = {e[2]: e[1] for e in events if e[0] == "done"}
    return sum(done.get(r, 1e18) <= at for r, at in due.items()) / len(due)


@given(st.integers(0, 10_000), st.sampled_from(sorted(POLICIES)), st.booleans())
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost_nothing_twice_and_kv_memory_stays_within_its_bounds(seed: int, name: str, lost: bool) -> None:
    """Every stage of every run ends once, in its order; reservations follow grants and are 0 in the end, outage or not."""
    w, engines = workload(seed), fleet(rtt_s=0.02, profile=SHORT_OF_KV)
    outages = [Outage(cluster="c1", from_s=2.0, to_s=4.0)] if lost else []
    events = play(w, engines, POLICIES[name], outages=outages)
    size = {e.spec.engine_id: e.spec for e in engines}
    held: defaultdict[str, dict[str, int]] = defaultdict(dict)
    ended: dict[str, float] = {}
    last_s = 0.0
    for what, at_s, *rest in events:
        assert len(rest) + 1 == len(EVENTS[what])
        assert at_s >= last_s, "time moves forward"
        last_s = at_s
        if what == "grant":
            stage, engine, kv = rest
            assert stage not in ended
            held[engine][stage] = kv
            assert len(held[engine]) <= size[engine].slots
            assert 0 <= sum(held[engine].values()) <= size[engine].kv_bytes
        elif what in {"end", "requeue"}:
            stage, engine = rest[:2]
            del held[engine][stage]
            if what == "end":
                assert stage not in ended
                ended[stage] = at_s
        elif what == "extend":
            (engine,) = (e for e, stages in held.items() if rest[0] in stages)
            assert rest[1] > held[engine][rest[0]]
            held[engine][rest[0]] = rest[1]  # beyond what the engine has, too; but then nothing is granted there
    assert not any(held.values())
    assert set(ended) == {f"{r.run_id}.{n}" for r in w.runs for n in range(len(r.stages))}
    assert sorted(e[2] for e in events if e[0] == "done") == sorted(r.run_id for r in w.runs)
    ready = {e[2]: e[1] for e in events if e[0] == "ready"}
    for r in w.runs:
        for n, s in enumerate(r.stages):
            after_s = max((ended[f"{r.run_id}.{b}"] for b in s.after), default=r.at_s) + s.gap_s
            assert ready[f"{r.run_id}.{n}"] == pytest.approx(after_s)


@pytest.mark.parametrize("told", [True, False], ids=["predicted", "learned while played"])
def test_the_same_workload_gives_the_same_events_byte_for_byte(told: bool) -> None:
    """Nothing depends on the clock of the machine, on hashes or on chance."""
    w = workload(7, told=told)
    once, again = (json.dumps(play(w, fleet(), POLICIES["ours"])) for _ in range(2))
    assert once == again


def test_where_there_is_room_nothing_waits() -> None:
    """Zero load, zero wait: a stage is granted the moment it is ready."""
    events = play(workload(3, every_s=30.0), fleet(4, slots=8), POLICIES["ours"])
    ready = {e[2]: e[1] for e in events if e[0] == "ready"}
    assert {e[1] - ready[e[2]] for e in events if e[0] == "grant"} == {0.0}


def test_more_capacity_never_costs_deadlines_beyond_noise() -> None:
    """Over ten workloads together: twice the engines meet at least as many deadlines, and no single one loses much."""
    few, many = (
        [met(play(workload(s, 40, every_s=0.05), fleet(n, slots=2), POLICIES["ours"])) for s in range(10)]
        for n in (1, 2)
    )
    assert sum(many) > sum(few)
    assert all(b >= a - 0.05 for a, b in zip(few, many, strict=True))


def test_who_knows_the_truth_does_not_do_worse() -> None:
    """The bound is one: with perfect knowledge ours meets at least as many deadlines over ten workloads together."""
    known = dataclasses.replace(POLICIES["ours"], knows=Knows.ALL)
    told, truth = (
        sum(met(play(workload(s, 60, every_s=0.05), fleet(1, slots=2), p)) for s in range(10))
        for p in (POLICIES["ours"], known)
    )
    assert truth >= told - 0.1


def test_the_nearest_engine_with_room_is_taken_and_the_network_counts_both_ways() -> None:
    """Half of the round trip before the engine sees it, half before the caller has the answer."""
    near, far = fleet(1, rtt_s=0.0)[0], dataclasses.replace(fleet(2, rtt_s=1.0)[1])
    w = workload(1, 6, every_s=20.0)
    events = play(w, [far, near], POLICIES["ours-nearest"])
    assert {e[3] for e in events if e[0] == "grant"} == {"m0"}
    away = play(w, [far], POLICIES["ours"])
    grant = {e[2]: e[1] for e in away if e[0] == "grant"}
    for e in (e for e in away if e[0] == "end"):
        assert e[4] >= grant[e[2]] + 0.5
        assert e[1] == pytest.approx(e[6] + 0.5)


class Clock:
    at_s = 1_790_000_000.0

    def now_s(self) -> float:
        return self.at_s


def test_the_bench_of_decisions_plays_the_fleets_it_names() -> None:
    """Every run of its fleets gets its decisions, and what one costs is measured."""
    found = scale.run((4, 12), (10,))
    assert [r["engines"] for r in found["fleet"]] == [4, 12]
    assert all(r["decisions"] > r["runs"] and r["us_per_decision"] > 0 for r in found["fleet"])


async def test_a_live_snapshot_gives_the_plan_that_was_carried_out(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler on a real Redis decides by the function that the simulator calls: replayed, the same grants."""
    assert world.plan is policy.plan
    queue = await fresh_redis_queue(redis_url, lease_s=1e6)
    taken: list[tuple[Snapshot, dict[str, Any], policy.Plan]] = []

    def recorded(snapshot: Snapshot, how: Policy, **at: Any) -> policy.Plan:
        made = policy.plan(snapshot, how, **at)
        taken.append((snapshot, at, made))
        return made

    monkeypatch.setattr(scheduler, "plan", recorded)
    clock = Clock()
    live = scheduler.Scheduler(
        queue, [e.spec for e in fleet(2, slots=2)], clock=clock, holder="s", policy=LIVE["ours"], lease_s=1e6
    )
    rng = random.Random(5)
    for i in range(40):
        clock.at_s += rng.random()
        await live.lead()
        now_s = clock.now_s()
        ticket = Ticket(
            stage_id=f"s{i}", client_id="c", model="m", run_id=f"r{i}", role=rng.choice("abc"), pushed_at_s=now_s,
            due_at_s=now_s, prompt_tokens=rng.randint(1, 500), deadline_at_s=now_s + rng.choice((1.0, 20.0, 300.0)),
        )  # fmt: skip
        await queue.push(ticket, engines=[], now_s=now_s)
        if i % 4 == 3:
            for r in await queue.running():
                await queue.cancel(r.ticket.stage_id, "m", client_id=None, now_s=now_s, draining=False)
        await live.step()
    carried_out = {r.ticket.stage_id: r.engine_id for r in await queue.running()}
    grants: dict[str, str] = {}
    for snapshot, at, made in taken:
        tickets = [Ticket.decode(t.encode()) for t in snapshot.tickets]  # as a file would keep them
        again = world.plan(dataclasses.replace(snapshot, tickets=tickets), LIVE["ours"], **at)
        assert again == made
        grants |= {t.stage_id: g.engine_id for t, g in again.grants}
    assert carried_out
    assert carried_out.items() <= grants.items()
