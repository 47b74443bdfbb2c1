"""The engine model's laws: `maestro_agents.simulator.engine`."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_agents.simulator.engine import CPU_TINY, Engine, EngineProfile, EngineRequest, RequestRecord, Scheduling
from maestro_agents.simulator.prefix_cache import Prefix, PrefixCache
from tests.engine_by_steps import EngineBySteps

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
    [
        {"base_s": 0.0},
        {"prefill_s_per_token": -1.0},
        {"prefill_read_s_per_token": -1.0},
        {"kv_read_s_per_token": -1.0},
        {"request_s": -1.0},
        {"num_blocks": 9},
        {"max_num_seqs": 0},
        {"step_tokens": 2},
    ],
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
    with pytest.raises(ValueError, match="prefix"):
        EngineRequest(request_id="b", prompt_tokens=9, output_tokens=1, prefix=(("x", 4), ("y", 4)))


def test_speed_divides_every_duration():
    """The same engine twice as fast takes half the time."""
    slow, fast = Engine(SMALL), Engine(SMALL.faster(2))
    for engine in (slow, fast):
        engine.submit(request("a"), 0.0)
    assert drain(slow)[0].ended_at_s == pytest.approx(2 * drain(fast)[0].ended_at_s)
    with pytest.raises(ValueError, match="speed"):
        SMALL.faster(0)


# -- the same as step by step -----------------------------------------------------------------------------------------
# Durations that a float holds exactly, as it does their sums: moments must be equal, and looks may fall on a step's end.
EXACT = EngineProfile(
    base_s=2**-7,
    prefill_s_per_token=2**-10,
    decode_s_per_seq=2**-9,
    kv_read_s_per_token=2**-14,
    max_num_seqs=4,
    step_tokens=8,
    block_size=4,
    num_blocks=14,
    max_model_len=40,
)
EXACT_PROFILES = st.builds(
    lambda **changes: dataclasses.replace(EXACT, **changes),
    scheduling=st.sampled_from(Scheduling),
    max_queued=st.sampled_from([None, 5]),
    kv_read_s_per_token=st.sampled_from([2**-14, 0.0]),
    prefill_read_s_per_token=st.sampled_from([0.0, 2**-13]),
    request_s=st.sampled_from([0.0, 2**-8]),
    max_num_seqs=st.sampled_from([4, 8, 1]),
    step_tokens=st.sampled_from([8, 30]),
    num_blocks=st.sampled_from([10, 14, 40]),
    block_size=st.sampled_from([4, 5]),
)


def script(seed: int, length: int) -> list[tuple[int, tuple]]:
    """Pauses and calls that keep an engine busy and its KV short; a longer script begins with the shorter ones."""
    r = random.Random(seed)
    hurry, alike = r.choice([8, 40, 120]), r.random()

    def submit() -> tuple:
        # A text's first tokens are the same for all that name it; what follows after a different number is not.
        ends = sorted(r.sample(range(1, 30), r.randrange(4) if r.random() < alike else 0))
        prefix = tuple((r.choice("ab"), end) for end in ends)
        return ("submit", r.randint(1, 24), r.randint(1, 16), r.randint(-2, 2), prefix)

    def other() -> tuple:
        kind = r.choice(["abort", "abort", "resize", "resize", "look", "wake", "wake", "clear"])
        more = {"abort": (r.randrange(40),), "resize": (r.randint(10, 16),)}
        return (kind, *more.get(kind, ()))

    return [(r.randrange(hurry), submit() if r.random() < 0.8 else other()) for _ in range(length)]


CALLS = st.builds(script, st.integers(0, 2**32), st.integers(0, 40))


def called(engine: Engine | EngineBySteps, call: tuple, now_s: float, names: list[str]) -> object:
    """Do one of `CALLS`; ``names``: whom it can abort."""
    match call:
        case ("submit", prompt, output, priority, prefix):
            name = names[-1]
            asked = EngineRequest(
                request_id=name, prompt_tokens=prompt, output_tokens=output, priority=priority, prefix=prefix
            )
            return engine.submit(asked, now_s)
        case ("abort", n):
            return engine.abort(names[n % len(names)], now_s) if names else None
        case ("resize", blocks):
            return engine.resize(blocks, now_s)
        case ("clear",):
            return engine.clear_cache(now_s)
        case _:
            return None


def seen(engine: Engine | EngineBySteps) -> tuple[object, ...]:
    """All that can be seen of an engine."""
    cache = engine._cache
    assert 0 <= cache.blocks <= engine.free_blocks <= engine.num_blocks
    assert 0 <= engine.kv_usage <= 1
    assert engine.num_running <= engine.profile.max_num_seqs
    texts = {key: (text.first, text.last, sorted(text.held)) for key, text in cache._texts.items()}
    return (
        engine.wake_at_s,
        engine.num_running,
        engine.num_waiting,
        engine.free_blocks,
        engine.kv_usage,
        engine.preemptions,
        cache.blocks,
        texts,
        list(cache._idle),
    )


@settings(deadline=None, max_examples=300)
@given(profile=EXACT_PROFILES, calls=CALLS)
def test_leaping_is_the_same_as_going_step_by_step(profile, calls):
    """Whatever is called and whenever, the engine shows, tells and records what the one that does every step does."""
    leaping, by_steps, late = Engine(profile), EngineBySteps(profile), Engine(profile)
    ended, ended_late = list[RequestRecord](), list[RequestRecord]()
    names: list[str] = []
    now_s = 0.0

    def look() -> bool:
        told, wanted = leaping.step(now_s), by_steps.step(now_s)
        assert told == wanted
        assert seen(leaping) == seen(by_steps)
        ended.extend(told.ended)
        return bool(told.ended)

    for pause, call in calls:
        now_s += pause / 1024
        if call == ("wake",) and by_steps.wake_at_s < math.inf:
            now_s = by_steps.wake_at_s
        if call[0] == "submit":
            names.append(f"r{len(names)}")
        assert len({called(engine, call, now_s, names) for engine in (leaping, by_steps, late)}) == 1
        if call[0] != "submit" or pause % 2:
            look()
    look()
    while (next_end_s := leaping.next_end_s) < math.inf:
        while leaping.wake_at_s < next_end_s:  # no end comes before it was said to
            now_s = leaping.wake_at_s
            assert not look()
        now_s = next_end_s
        look()
        ended_late.extend(late.ended(next_end_s))
    ended_late.extend(late.ended(now_s))
    assert ended_late == ended
    assert leaping.num_running == leaping.num_waiting == 0
    assert leaping.free_blocks == leaping.num_blocks
    for record in ended:
        assert record.cached_tokens % profile.block_size == 0
        assert record.cached_tokens < record.request.prompt_tokens


def recorded(engine: Engine | EngineBySteps, calls: list) -> list[RequestRecord]:
    """The records of a script of `CALLS`."""
    names: list[str] = []
    now_s = 0.0
    for pause, call in calls:
        now_s += pause / 1024
        if call[0] == "submit":
            names.append(f"r{len(names)}")
        called(engine, call, now_s, names)
    return list(engine.step(1e9).ended)


@settings(deadline=None, max_examples=100)
@given(profile=EXACT_PROFILES, calls=CALLS)
def test_moments_are_those_of_going_step_by_step_where_floats_round_too(profile, calls):
    """With durations that no float holds exactly, moments differ by rounding and nothing else does; a second run, by nothing."""
    rounding = profile.faster(math.pi)
    ended = recorded(Engine(rounding), calls)
    assert repr(recorded(Engine(rounding), calls)) == repr(ended)
    moments = ("started_at_s", "first_token_at_s", "ended_at_s")
    for record, wanted in zip(ended, recorded(EngineBySteps(rounding), calls), strict=True):
        for moment in moments:
            assert getattr(record, moment) == pytest.approx(getattr(wanted, moment), rel=1e-6)
        same = {moment: getattr(wanted, moment) for moment in moments}
        assert dataclasses.replace(record, **same) == wanted


def test_a_long_answer_costs_as_few_looks_as_a_short_one():
    """Whoever waits for ends alone wakes once for a prompt's chunk and once for a whole answer."""
    engine = Engine(EngineProfile())
    engine.submit(request("a", prompt=4000, output=5000), 0.0)
    looks = 0
    while engine.next_end_s < math.inf:
        looks += 1
        ended = engine.ended(engine.next_end_s)
    assert looks == 3
    assert ended[0].output_tokens == 5000


def test_reading_the_kv_costs_time_that_grows_with_every_token():
    """Each decoding step takes kv_read_s_per_token for each token that the decoding request has by then."""
    engine = Engine(dataclasses.replace(SMALL, kv_read_s_per_token=0.001))
    engine.submit(request("a", prompt=8, output=5), 0.0)
    (record,) = drain(engine)
    read_s = 0.001 * sum(8 + n for n in (1, 2, 3, 4))
    assert record.generation_s == pytest.approx(4 * (SMALL.base_s + SMALL.decode_s_per_seq) + read_s)


@pytest.mark.parametrize("step_tokens", [8, 30])
def test_attention_makes_a_prompt_cost_with_its_square_in_whatever_chunks(step_tokens: int):
    """Each of its tokens takes prefill_read_s_per_token for every token up to it."""
    engine = Engine(dataclasses.replace(SMALL, prefill_read_s_per_token=0.001, step_tokens=step_tokens))
    engine.submit(request("a", prompt=20, output=1), 0.0)
    (record,) = drain(engine)
    steps = -(-20 // step_tokens)
    plain_s = steps * SMALL.base_s + 20 * SMALL.prefill_s_per_token
    assert record.ended_at_s == pytest.approx(plain_s + 0.001 * sum(range(1, 21)))


def test_a_request_costs_its_own_seconds_once_in_the_step_in_which_it_starts():
    """Each of two requests makes the step that first computes for it request_s longer, and no other."""
    engine = Engine(dataclasses.replace(SMALL, request_s=0.5, step_tokens=8))
    for name in ("a", "b"):
        engine.submit(request(name, prompt=6, output=2), 0.0)
    a, b = drain(engine)
    plain_s = SMALL.base_s + 6 * SMALL.prefill_s_per_token
    assert a.first_token_at_s == pytest.approx(plain_s + 0.5)
    # Then b starts beside a's decode; neither pays again.
    assert b.first_token_at_s == pytest.approx(a.first_token_at_s + plain_s + SMALL.decode_s_per_seq + 0.5)
    assert b.ended_at_s == pytest.approx(b.first_token_at_s + SMALL.base_s + SMALL.decode_s_per_seq)


# -- prefixes ---------------------------------------------------------------------------------------------------------
def cached(engine: Engine, name: str, prompt: int, output: int, prefix: Prefix, at_s: float = 0.0) -> int:
    """Have a request answered; how much of it was there already."""
    engine.submit(EngineRequest(request_id=name, prompt_tokens=prompt, output_tokens=output, prefix=prefix), at_s)
    return drain(engine)[-1].cached_tokens


def test_the_next_call_of_a_conversation_hits_prompt_and_answer_of_the_last():
    """All whole blocks of them but of the last token, whose KV was never computed; so does no other conversation."""
    engine = Engine(SMALL)
    assert cached(engine, "1", 9, 4, (("a", 13),)) == 0
    assert cached(engine, "2", 20, 2, (("a", 22),)) == 12  # of 13 tokens 12 have KV
    assert cached(engine, "3", 20, 2, (("b", 22),)) == 0


def test_what_follows_a_shared_beginning_does_not_matter_to_it():
    """Runs share their system prompt, and a branch what comes before it; what nobody names is not kept."""
    engine = Engine(SMALL)
    assert cached(engine, "1", 12, 1, (("system", 8), ("a", 13))) == 0
    assert cached(engine, "2", 12, 1, (("system", 8), ("b", 13))) == 8
    assert cached(engine, "3", 12, 1, (("other", 8), ("a", 13))) == 0
    assert cached(engine, "4", 18, 1, (("system", 8), ("a", 11), ("branch", 18))) == 8  # 11 tokens are 2 blocks
    assert cached(engine, "5", 18, 1, ()) == 0
    assert cached(engine, "6", 18, 1, ()) == 0


def test_one_token_at_least_is_computed():
    """A prompt that is there as a whole still takes a step, for its last block."""
    engine = Engine(SMALL)
    assert cached(engine, "1", 8, 4, (("a", 8),)) == 0
    assert cached(engine, "2", 8, 4, (("a", 8),)) == 4


def test_a_hit_saves_its_prefill():
    """The time to the first token is that of a prompt shorter by what was there."""
    engine = Engine(SMALL)
    cached(engine, "1", 8, 1, (("a", 8),))
    engine.submit(EngineRequest(request_id="2", prompt_tokens=13, output_tokens=1, prefix=(("a", 13),)), 1.0)
    (record,) = drain(engine)
    assert record.ttft_s == pytest.approx(SMALL.base_s + 5 * SMALL.prefill_s_per_token)


def test_requests_that_come_together_share_what_the_first_computes():
    """A block can be hit from the step on that computes it."""
    engine = Engine(dataclasses.replace(SMALL, step_tokens=20))
    for name in "ab":
        engine.submit(
            EngineRequest(request_id=name, prompt_tokens=9, output_tokens=1, prefix=(("system", 8), (name, 9))), 0.0
        )
    assert [r.cached_tokens for r in drain(engine)] == [0, 8]


def test_what_was_not_used_for_longest_makes_room_first():
    """Kept blocks count as free; when they are needed, the least recently used go, of a text its end first."""
    engine = Engine(SMALL)  # 10 blocks of 4 tokens
    for name in "abc":
        cached(engine, name, 12, 1, ((name, 12),))
    assert engine.kv_usage == 0
    cached(engine, "a again", 12, 1, (("a", 12),))
    cached(engine, "long", 20, 1, ())  # of 10 blocks 9 are kept and 5 needed
    assert cached(engine, "b", 16, 1, (("b", 16),)) == 0
    assert cached(engine, "a", 16, 1, (("a", 16),)) == 12


def test_of_one_prompt_the_end_goes_first():
    """A beginning is kept longer than what follows it, even where a longer text of that name was given up before."""
    cache = PrefixCache(4)
    branch, longer = (("run", 8), ("b", 16)), (("run", 16),)
    for prefix in (branch, longer):
        cache.hold(prefix, 0, 16)
    cache.release(longer, 16, 16)
    assert cache.blocks == 2
    cache.release(branch, 16, 16)
    assert cache.blocks == 6
    cache.shrink(4)
    assert [cache.hit(branch, 16), cache.hit(longer, 16)] == [8, 16]
    cache.shrink(1)
    assert [cache.hit(branch, 16), cache.hit(longer, 16)] == [4, 4]


def test_a_preempted_request_finds_again_what_nobody_took():
    """Blocks given back under pressure can still be hit by whoever gave them."""
    engine = Engine(SMALL)
    low = EngineRequest(request_id="low", prompt_tokens=12, output_tokens=16, priority=5, prefix=(("low", 28),))
    engine.submit(low, 0.0)
    engine.submit(request("high", prompt=12, output=14, priority=-5), 0.0)
    plain = Engine(SMALL)
    plain.submit(dataclasses.replace(low, prefix=()), 0.0)
    plain.submit(request("high", prompt=12, output=14, priority=-5), 0.0)
    again, computed = drain(engine)[-1], drain(plain)[-1]
    assert again.preemptions == computed.preemptions == 1
    assert again.cached_tokens == 0  # nothing was there when it first started
    assert again.ended_at_s < computed.ended_at_s


# -- the engine as a whole --------------------------------------------------------------------------------------------
def test_a_cleared_cache_hits_nothing():
    """As after vLLM's sleep."""
    engine = Engine(SMALL)
    cached(engine, "1", 9, 4, (("a", 13),))
    engine.clear_cache(1.0)
    assert cached(engine, "2", 20, 2, (("a", 22),), 1.0) == 0


def test_a_smaller_kv_admits_nobody_until_enough_is_free():
    """Blocks can leave while they are in use: none seems free, and who waits goes on waiting."""
    engine = Engine(dataclasses.replace(SMALL, num_blocks=20, step_tokens=40))
    engine.submit(request("a", prompt=22, output=3), 0.0)
    engine.submit(request("b", prompt=22, output=18), 0.0)
    at_s = engine.wake_at_s
    engine.resize(10, at_s)
    assert engine.free_blocks == 0
    assert engine.kv_usage == 1
    engine.submit(request("c", prompt=22), at_s)
    ended = [r.request.request_id for r in drain(engine)]
    assert ended == ["a", "b", "c"]
    assert engine.preemptions == 0
    assert engine.free_blocks == engine.num_blocks == 10
    with pytest.raises(ValueError, match="KV blocks"):
        engine.resize(9, 1e9)
