"""The engine model's laws: `maestro_agents.simulator.engine`."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_agents.simulator.engine import CPU_TINY, Engine, EngineProfile, EngineRequest, RequestRecord, Scheduling

SMALL = EngineProfile(
    base_s=0.01,
    prefill_s_per_token=0.001,
    decode_s_per_seq=0.002,
    max_num_seqs=3,
    step_tokens=8,
    block_size=4,
    num_blocks=10,
    max_model_len=40,
)


def request(name: str, prompt: int = 4, output: int = 3, priority: int = 0) -> EngineRequest:
    """A small request."""
    return EngineRequest(request_id=name, prompt_tokens=prompt, output_tokens=output, priority=priority)


def drain(engine: Engine) -> list[RequestRecord]:
    """Step punctually until the engine is idle."""
    ended: list[RequestRecord] = []
    while engine.wake_at_s < math.inf:
        ended += engine.step(engine.wake_at_s).ended
    return ended


# What a caller may do: after a pause, submit (prompt, output, priority) or abort the n-th submitted.
ACTIONS = st.lists(
    st.tuples(
        st.floats(0, 0.2),
        st.one_of(
            st.tuples(st.integers(1, 24), st.integers(1, 16), st.integers(-2, 2)),
            st.integers(0, 20),
        ),
    ),
    max_size=25,
)
PROFILES = st.sampled_from(
    [
        SMALL,
        dataclasses.replace(SMALL, scheduling=Scheduling.FCFS),
        dataclasses.replace(SMALL, max_queued=3),
        dataclasses.replace(SMALL, step_tokens=100, max_num_seqs=8),
    ]
)


def play(
    profile: EngineProfile, actions: list, *, punctual: bool = True
) -> tuple[list[RequestRecord], dict[str, int], int]:
    """Run a script; return the records, the tokens told by request, and how many requests were accepted."""
    engine = Engine(profile)
    ended: list[RequestRecord] = []
    told: dict[str, int] = {}
    now_s, accepted = 0.0, 0

    def look(at_s: float) -> None:
        progress = engine.step(at_s)
        ended.extend(progress.ended)
        for name, n in progress.tokens.items():
            told[name] = told.get(name, 0) + n
        assert 0 <= engine.free_blocks <= profile.num_blocks
        assert engine.num_running <= profile.max_num_seqs
        assert 0 <= engine.kv_usage <= 1

    names: list[str] = []
    for pause_s, action in actions:
        now_s += pause_s
        while punctual and engine.wake_at_s <= now_s:
            look(engine.wake_at_s)
        if isinstance(action, int):
            if action < len(names):
                engine.abort(names[action], now_s)
        else:
            prompt, output, priority = action
            names.append(f"r{len(names)}")
            accepted += engine.submit(request(names[-1], prompt, output, priority), now_s)
        if punctual:
            look(now_s)
    while engine.wake_at_s < math.inf:
        look(engine.wake_at_s if punctual else 1e9)
    look(now_s)
    assert engine.free_blocks == profile.num_blocks
    assert engine.num_running == engine.num_waiting == 0
    return ended, told, accepted


@settings(deadline=None, max_examples=200)
@given(profile=PROFILES, actions=ACTIONS)
def test_every_accepted_request_ends_exactly_once_and_kv_stays_within_bounds(profile, actions):
    """Nothing is lost or ended twice, and blocks in use are never below zero or above what there is."""
    ended, told, accepted = play(profile, actions)
    assert len({r.request.request_id for r in ended}) == len(ended) == accepted
    for record in ended:
        assert told.get(record.request.request_id, 0) == record.output_tokens
        if not record.aborted:
            assert record.output_tokens == record.request.output_tokens
            assert record.arrived_at_s <= record.started_at_s < record.first_token_at_s <= record.ended_at_s


@settings(deadline=None, max_examples=100)
@given(profile=PROFILES, actions=ACTIONS)
def test_the_same_input_gives_the_same_trace(profile, actions):
    """Two engines that are told the same things at the same moments do the same, to the last digit."""
    assert play(profile, actions) == play(profile, actions)


@settings(deadline=None, max_examples=100)
@given(profile=PROFILES, actions=ACTIONS)
def test_looking_late_changes_nothing(profile, actions):
    """Whoever steps seldom learns the same as whoever steps at every wake-up."""
    assert play(profile, actions) == play(profile, actions, punctual=False)


@given(prompt=st.integers(1, 24), output=st.integers(1, 16))
def test_zero_load_gives_zero_wait(prompt, output):
    """A request that finds the engine idle starts at once and takes exactly its steps' time."""
    engine = Engine(SMALL)
    engine.submit(request("a", prompt, output), 5.0)
    (record,) = drain(engine)
    assert record.queue_s == 0
    chunks = math.ceil(prompt / SMALL.step_tokens)
    assert record.ttft_s == pytest.approx(chunks * SMALL.base_s + prompt * SMALL.prefill_s_per_token)
    assert record.generation_s == pytest.approx((output - 1) * (SMALL.base_s + SMALL.decode_s_per_seq))


def one_at_a_time(scheduling: Scheduling, requests: list[tuple[str, int, float]]) -> list[str]:
    """In which order an engine with one place serves requests that come while it is busy."""
    engine = Engine(dataclasses.replace(SMALL, max_num_seqs=1, scheduling=scheduling))
    engine.submit(request("first", output=16), 0.0)
    for name, priority, at_s in requests:
        engine.submit(request(name, priority=priority), at_s)
    return [r.request.request_id for r in drain(engine)]


def test_lower_priority_numbers_go_first_and_ties_by_arrival():
    """Under priority scheduling the waiting go by (priority, arrival, id)."""
    waiting = [("c", 5, 0.01), ("b", 0, 0.02), ("e", 5, 0.005), ("a", -3, 0.03), ("d2", 5, 0.01)]
    in_time = sorted(waiting, key=lambda w: w[2])
    assert one_at_a_time(Scheduling.PRIORITY, in_time) == ["first", "a", "b", "e", "c", "d2"]


def test_fcfs_ignores_priority():
    """Under FCFS the waiting go by submission."""
    assert one_at_a_time(Scheduling.FCFS, [("x", 5, 0.01), ("y", 0, 0.02), ("z", -5, 0.03)]) == ["first", "x", "y", "z"]


def test_a_high_priority_arrival_displaces_nobody_while_blocks_suffice():
    """A full batch is not broken up for a better priority: as in vLLM, only KV shortage preempts."""
    engine = Engine(dataclasses.replace(SMALL, max_num_seqs=1))
    engine.submit(request("low", output=8, priority=9), 0.0)
    engine.submit(request("high", priority=-9), 0.01)
    assert [r.request.request_id for r in drain(engine)] == ["low", "high"]
    assert engine.preemptions == 0


def test_kv_shortage_preempts_the_lowest_priority_which_recomputes():
    """When blocks run out the lowest-priority running request gives its own back, and still answers in full."""
    engine = Engine(SMALL)
    engine.submit(request("low", prompt=12, output=16, priority=5), 0.0)
    engine.submit(request("high", prompt=12, output=20, priority=-5), 0.0)
    ended = drain(engine)
    assert [r.request.request_id for r in ended] == ["high", "low"]
    assert [r.preemptions for r in ended] == [0, 1]
    assert engine.preemptions == 1
    assert ended[1].output_tokens == 16


def test_a_long_prompt_is_computed_in_chunks_beside_decoding():
    """A prompt beyond the step's budget does not stop those that already decode."""
    engine = Engine(SMALL)
    engine.submit(request("talks", prompt=2, output=10), 0.0)
    engine.step(engine.wake_at_s)
    engine.submit(request("reads", prompt=20, output=1), engine.wake_at_s - 0.001)
    told: list[set[str]] = []
    while engine.wake_at_s < math.inf:
        told.append(set(engine.step(engine.wake_at_s).tokens))
    assert told[:4] == [{"talks"}, {"talks"}, {"talks"}, {"talks", "reads"}]  # 20 tokens in chunks of 7


def test_a_full_queue_rejects_and_an_abort_makes_room():
    """The bound counts waiting and running requests; whoever is rejected leaves no trace."""
    engine = Engine(dataclasses.replace(SMALL, max_num_seqs=1, max_queued=2))
    assert engine.submit(request("a"), 0.0)
    assert engine.submit(request("b"), 0.0)
    assert not engine.submit(request("c"), 0.0)
    assert engine.abort("b", 0.001)
    assert engine.submit(request("c"), 0.001)
    assert [(r.request.request_id, r.aborted) for r in drain(engine)] == [("b", True), ("a", False), ("c", False)]


def test_an_abort_frees_kv_at_once_and_only_once():
    """An aborted request gives its blocks back in the middle of a step; a second abort finds nothing."""
    engine = Engine(SMALL)
    engine.submit(request("a", prompt=8, output=10), 0.0)
    assert engine.kv_usage > 0
    assert engine.abort("a", 0.001)
    assert engine.kv_usage == 0
    assert not engine.abort("a", 0.002)
    (record,) = drain(engine)
    assert record.aborted
    assert record.output_tokens == 0


@pytest.mark.parametrize(("streams", "measured"), [(1, 207), (4, 410), (16, 614)])
def test_the_cpu_profile_resembles_what_was_measured(streams, measured):
    """Decode speed of the tiny model on two cores is met within 10 %."""
    engine = Engine(CPU_TINY)
    for n in range(streams):
        engine.submit(request(str(n), prompt=1, output=200), 0.0)
    ended = drain(engine)
    tokens_per_s = 200 * streams / max(r.ended_at_s for r in ended)
    assert tokens_per_s == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize(
    "change",
    [{"base_s": 0.0}, {"prefill_s_per_token": -1.0}, {"num_blocks": 9}, {"max_num_seqs": 0}, {"step_tokens": 2}],
)
def test_an_impossible_profile_cannot_be_built(change):
    """The constructor refuses speeds and sizes under which the model would hang."""
    with pytest.raises(ValueError, match="engine profile"):
        dataclasses.replace(SMALL, **change)


def test_a_request_that_could_never_fit_is_an_error_not_a_wait():
    """Prompt and output beyond max_model_len, or an id that is here already, raise."""
    engine = Engine(SMALL)
    with pytest.raises(ValueError, match="max_model_len"):
        engine.submit(request("a", prompt=30, output=11), 0.0)
    engine.submit(request("a"), 0.0)
    with pytest.raises(ValueError, match="already"):
        engine.submit(request("a"), 0.0)


def test_speed_divides_every_duration():
    """The same engine twice as fast takes half the time."""
    slow, fast = Engine(SMALL), Engine(SMALL.faster(2))
    for engine in (slow, fast):
        engine.submit(request("a"), 0.0)
    assert drain(slow)[0].ended_at_s == pytest.approx(2 * drain(fast)[0].ended_at_s)
    with pytest.raises(ValueError, match="speed"):
        SMALL.faster(0)
