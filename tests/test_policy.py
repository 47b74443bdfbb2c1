"""Policies: pure functions from a snapshot to a plan."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_agents.core import EngineSpec, EngineState, Prediction, ServiceClass, Ticket
from maestro_agents.policy import LIVE, POLICIES, Snapshot, plan, priority
from maestro_agents.policy.fairness import Shares

NOW = 1_790_000_000.0


def ticket(stage_id: str, **changes: object) -> Ticket:
    base = Ticket(
        stage_id=stage_id, client_id="c", model="m", role="r", prompt_tokens=100, pushed_at_s=NOW, due_at_s=NOW
    )
    return base.evolve(**changes)


def prediction(
    service_s: float = 1.0, remaining_s: float = 0.0, tokens: float = 50.0, tool_s: float = 0.0, slack_s: float = 0.0
) -> Prediction:
    return Prediction(
        output_tokens_mean=tokens, output_tokens_p50=tokens, output_tokens_p90=tokens, output_tokens_p99=tokens,
        service_s=service_s, remaining_s=remaining_s, remaining_tool_s=tool_s, slack_s=slack_s,
    )  # fmt: skip


def engine(engine_id: str = "a", **changes: object) -> EngineState:
    state = {k: changes.pop(k) for k in list(changes) if k in EngineState.__dataclass_fields__}
    spec = {"engine_id": engine_id, "url": "u", "model": "m", "slots": 2, **changes}
    return EngineState(spec=EngineSpec(**spec), **state)  # type: ignore[arg-type]


def decide(tickets: list[Ticket], predictions: list[Prediction], engines: list[EngineState], order: str = "ours"):
    by_id = {t.stage_id: p for t, p in zip(tickets, predictions, strict=True)}
    return plan(Snapshot(tickets=tickets, predictions=by_id, engines=engines), POLICIES[order], epoch=3, now_s=NOW)


def test_the_run_with_least_left_goes_first() -> None:
    """Of two stages pushed together, the one whose run is nearly done is granted."""
    long, short = ticket("long"), ticket("short")
    made = decide([long, short], [prediction(1, 20), prediction(1, 0)], [engine(slots=1)])
    assert [t.stage_id for t, _ in made.grants] == ["short"]


def test_a_run_that_cannot_make_it_goes_later() -> None:
    """Late demotion: a lost run does not cost a winnable one its deadline, at about the same work."""
    lost = ticket("lost", deadline_at_s=NOW + 0.5)
    winnable = ticket("winnable", deadline_at_s=NOW + 30)
    made = decide([lost, winnable], [prediction(1), prediction(2)], [engine(slots=1)])
    assert [t.stage_id for t, _ in made.grants] == ["winnable"]


def test_a_late_run_is_not_starved() -> None:
    """After the stated bound a late stage goes before everything pushed later."""
    ago_s = priority.LATE_S + priority.MAX_SLACK_S + 1
    old = ticket("old", pushed_at_s=NOW - ago_s, deadline_at_s=NOW - ago_s + 30)
    fresh = ticket("fresh", deadline_at_s=NOW + 3)
    made = decide([fresh, old], [prediction(1), prediction(1)], [engine(slots=1)])
    assert [t.stage_id for t, _ in made.grants] == ["old"]


@given(
    st.lists(
        st.tuples(
            st.floats(0, 50), st.floats(0, 50), st.floats(0, 1e4), st.floats(0, 1e4), st.floats(-10, 700), st.floats(0, 2000)
        ),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_no_stage_is_passed_by_one_pushed_later_than_the_bound(rows: list[tuple[float, ...]]) -> None:
    """The starvation bound holds for any predictions and deadlines; tools and slower siblings do not move it."""
    for service, remaining, tool, slack, deadline, age in rows:
        t = ticket("s", pushed_at_s=NOW - age, deadline_at_s=NOW + deadline)
        bound = service + remaining + priority.MAX_SLACK_S + priority.LATE_S + priority.MAX_JOIN_S
        predicted = prediction(service, remaining, tool_s=tool, slack_s=slack)
        moment = priority.ours(t, predicted, NOW)
        assert moment <= t.pushed_at_s + bound + 1e-6
        assert moment >= priority.ours(t, dataclasses.replace(predicted, slack_s=0.0), NOW)


def test_time_in_tools_counts_against_the_deadline_and_not_for_the_order() -> None:
    """A run that will sit in tools past its deadline is late, and far past it lost; else tools say nothing of its turn."""
    t = ticket("s", deadline_at_s=NOW + 20)
    assert [priority.is_late(t, prediction(1, 5, tool_s=tool), NOW) for tool in (0, 13, 15)] == [False, False, True]
    no_deadline = ticket("s")
    assert priority.ours(no_deadline, prediction(1, 5, tool_s=99), NOW) == priority.ours(
        no_deadline, prediction(1, 5), NOW
    )
    none, some, far = (priority.ours(t, prediction(1, 5, tool_s=tool), NOW) for tool in (0, 15, 80))
    assert (some - none, far - none) == (0, priority.LATE_S)


def test_a_run_is_given_up_only_beyond_doubt() -> None:
    """Predictions are often twice the truth: a run that seems late keeps its turn until a quarter of the rest is too much."""
    t = ticket("s", deadline_at_s=NOW + 20)
    for left_s, late, lost in ((10, False, False), (30, True, False), (90, True, True)):
        p = prediction(1, left_s)
        assert (priority.is_late(t, p, NOW), priority.is_lost(t, p, NOW)) == (late, lost)


def test_a_tenant_ahead_of_its_share_waits_behind_itself() -> None:
    """One that floods the pool owes; the others, and one alone, do not, whatever they ask for."""
    shares = Shares()
    flood = [shares.charge("flood", 10.0, slots=2, now_s=NOW) for _ in range(20)]
    assert shares.charge("calm", 10.0, slots=2, now_s=NOW) == 0.0
    later = shares.charge("flood", 10.0, slots=2, now_s=NOW)
    assert flood == [0.0] * 20, "nobody else was there"
    assert later > 80.0
    alone, heavy = Shares(), Shares({"heavy": 3.0})
    assert max(alone.charge("one", 60.0, slots=1, now_s=NOW + i) for i in range(50)) == 0.0
    debts = dict.fromkeys(("heavy", "light"), 0.0)
    for _ in range(20):
        for t in debts:
            debts[t] = heavy.charge(t, 10.0, slots=2, now_s=NOW)
    assert debts["heavy"] == 0.0
    assert debts["light"] > 0.0, "as much work at a third of the weight"
    assert shares.charge("flood", 1.0, slots=2, now_s=NOW + 1e6) == 0.0, "what it owed is long served"


def test_a_branch_that_waits_for_its_sibling_lets_others_pass() -> None:
    """By as much as its run does not care; the slowest sibling keeps its turn, and goes before it."""
    run = {"deadline_at_s": NOW + 60}
    short, slow, other = ticket("short", **run), ticket("slow", **run), ticket("other", deadline_at_s=NOW + 64)
    # What is left of the run after each of the siblings holds the rest of the slower one: it is the same run.
    known = [prediction(1, 9, slack_s=6), prediction(7, 3), prediction(1, 9)]
    made = decide([short, slow, other], known, [engine(slots=3)])
    assert [t.stage_id for t, _ in made.grants] == ["slow", "other", "short"]
    limited = short.evolve(limit_at_s=NOW + 2)
    assert priority.ours(limited, known[0], NOW) < priority.ours(short, known[0], NOW), "it has no more time"
    made = decide([short, slow, other], [prediction(1, 9), *known[1:]], [engine(slots=3)])
    assert [t.stage_id for t, _ in made.grants][-1] == "other"


@pytest.mark.parametrize("order", sorted(LIVE))
def test_every_order_is_a_finite_moment_and_grants_while_there_is_room(order: str) -> None:
    """No order leaves a free slot unused while a stage that fits waits."""
    tickets = [ticket(f"s{i}", deadline_at_s=d) for i, d in enumerate((math.inf, NOW + 5, NOW - 5))]
    made = decide(tickets, [prediction()] * 3, [engine(slots=3)], order)
    assert len(made.grants) == 3
    assert all(math.isfinite(m) for moments in made.moments.values() for m in moments.values())


def test_fcfs_is_the_order_of_the_pushes() -> None:
    """The baseline looks at nothing else."""
    first = ticket("first", pushed_at_s=NOW - 2, due_at_s=NOW - 2)
    made = decide([ticket("second"), first], [prediction(0.1), prediction(99)], [engine(slots=1)], "fcfs")
    assert [t.stage_id for t, _ in made.grants] == ["first"]


def test_a_stage_goes_where_it_will_be_answered_soonest_and_the_reasons_add_up() -> None:
    """The faster engine wins; the grant carries its predicted seconds by part."""
    slow, fast = engine("slow", decode_s_per_token=0.04), engine("fast", decode_s_per_token=0.01)
    ((_, grant),) = decide([ticket("s")], [prediction()], [slow, fast]).grants
    assert grant.engine_id == "fast"
    assert grant.because["decode_s"] == pytest.approx(50 * 0.01)
    assert sum(grant.because.values()) == pytest.approx(50 * 0.01 + 100 * 0.0005)


def test_stages_spread_over_equal_engines() -> None:
    """Each grant of a plan counts for the next one."""
    made = decide([ticket(f"s{i}") for i in range(4)], [prediction()] * 4, [engine("a"), engine("b")])
    assert sorted(g.engine_id for _, g in made.grants) == ["a", "a", "b", "b"]


def test_a_stream_is_reserved_what_is_likely_and_any_other_answer_what_is_almost_sure() -> None:
    """What can grow begins at the p50; what cannot gets the p99. The grant says how many tokens that covers."""
    known = dataclasses.replace(prediction(), output_tokens_p50=30.2, output_tokens_p90=60.0, output_tokens_p99=90.0)
    tickets = [ticket("whole"), ticket("streams", streams=True), ticket("bounded", max_tokens=20)]
    made = decide(tickets, [known] * 3, [engine(slots=3, kv_bytes=1000, kv_bytes_per_token=2)])
    covered = {t.stage_id: (g.output_tokens, g.kv_bytes) for t, g in made.grants}
    assert covered == {"whole": (90, 380), "streams": (31, 262), "bounded": (20, 240)}


def test_a_guess_alone_keeps_nobody_out_for_ever() -> None:
    """An answer that may be longer than an empty engine can hold gets all of it; a prompt that does not fit is refused."""
    long = dataclasses.replace(prediction(), output_tokens_p99=5000.0)
    place = engine(kv_bytes=1000, kv_bytes_per_token=1)
    made = decide([ticket("s")], [long], [place])
    assert [g.kv_bytes for _, g in made.grants] == [1000]
    assert not decide([ticket("s")], [long], [dataclasses.replace(place, reserved_kv_bytes=1)]).grants
    made = decide([ticket("s", prompt_tokens=1000)], [long], [place])
    assert [r.reason for _, r in made.refusals] == ["no engine fits"]


def test_admission_keeps_to_slots_and_kv_bytes() -> None:
    """Neither is exceeded by a plan, whatever waits."""
    places = [engine("a", slots=8, kv_bytes=400, kv_bytes_per_token=1), engine("b", slots=1)]
    made = decide([ticket(f"s{i}") for i in range(9)], [prediction()] * 9, places)
    used = [g for _, g in made.grants if g.engine_id == "a"]
    assert sum(g.kv_bytes for g in used) <= 400
    assert len(used) == 2
    assert len(made.grants) == 3


def test_a_large_stage_is_not_starved_of_memory_by_small_ones() -> None:
    """Having waited long enough, it keeps what becomes free from being taken by those behind it."""
    big = ticket("big", prompt_tokens=900, pushed_at_s=NOW - 60, due_at_s=NOW - 60)
    place = engine("a", slots=8, kv_bytes=1000, kv_bytes_per_token=1, reserved_slots=1, reserved_kv_bytes=300)
    assert not decide([big, ticket("small")], [prediction(), prediction()], [place]).grants


def test_what_could_never_fit_is_refused_at_once() -> None:
    """A stage larger than every engine is told so, rather than left to wait for ever."""
    made = decide([ticket("s", prompt_tokens=5000)], [prediction()], [engine(kv_bytes=1000, kv_bytes_per_token=1)])
    assert [(t.stage_id, r.reason) for t, r in made.refusals] == [("s", "no engine fits")]


def test_refused_early_only_who_asked_for_it() -> None:
    """A deadline that cannot be met is refused, with a time to come back, where the caller chose that; else served late."""
    late = {"deadline_at_s": NOW + 0.1}
    made = decide([ticket("told", refuse_late=True, **late), ticket("served", **late)], [prediction(2)] * 2, [engine()])
    assert [(t.stage_id, r.reason) for t, r in made.refusals] == [("told", "deadline")]
    assert made.refusals[0][1].retry_after_s >= 0.5
    assert [t.stage_id for t, _ in made.grants] == ["served"]


def test_pinned_excluded_and_dead_engines() -> None:
    """State stays where it is; an engine that failed the stage is avoided while another lives; the dead get nothing."""
    a, b, dead = engine("a"), engine("b"), engine("dead", healthy=False)
    places = {
        "pinned": decide([ticket("s", pinned_engine="b")], [prediction()], [a, b]).grants,
        "pinned, dead": decide([ticket("s", pinned_engine="dead")], [prediction()], [a, dead]).grants,
        "excluded": decide([ticket("s", excluded_engines=("a",))], [prediction()], [a, b]).grants,
        "all failed": decide([ticket("s", excluded_engines=("a", "b"))], [prediction()], [a, b]).grants,
        "dead": decide([ticket("s")], [prediction()], [dead]).grants,
    }
    assert {k: [g.engine_id for _, g in v] for k, v in places.items()} == {
        "pinned": ["b"], "pinned, dead": ["a"], "excluded": ["b"], "all failed": ["a"], "dead": [],
    }  # fmt: skip


def test_a_nested_stage_needs_no_room() -> None:
    """Its parent holds the slot that it would wait for."""
    made = decide([ticket("child", nested=True)], [prediction()], [engine(slots=1, reserved_slots=1)])
    assert [t.stage_id for t, _ in made.grants] == ["child"]


def test_interactive_and_batch_share_by_slack() -> None:
    """At equal remaining work the run with less time goes first; a batch run that waited long enough goes before it."""
    batch = {"service_class": ServiceClass.BATCH, "deadline_at_s": NOW + 600}
    urgent = ticket("urgent", deadline_at_s=NOW + 10)
    assert (
        decide([ticket("batch", **batch), urgent], [prediction()] * 2, [engine(slots=1)]).grants[0][0].stage_id
        == "urgent"
    )
    old = ticket("batch", **{**batch, "pushed_at_s": NOW - priority.MAX_SLACK_S})
    assert decide([old, urgent], [prediction()] * 2, [engine(slots=1)]).grants[0][0].stage_id == "batch"


def test_what_is_learned_meanwhile_does_not_shuffle_those_who_wait() -> None:
    """A moment once written stays while the prediction changes a little; a lost deadline moves it."""
    waiting = ticket("s", due_at_s=NOW + 3.2, deadline_at_s=NOW + 2)
    assert not decide([waiting], [prediction(1.0)], [engine(slots=1)]).moments
    assert decide([waiting], [prediction(3.0)], [engine(slots=1)]).moments["m"]["s"] > NOW + 12
