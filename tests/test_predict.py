"""What is predicted from online statistics: output lengths by role, speeds by engine."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_agents.core import EngineSpec, Observation, ServiceClass, Status, Ticket
from maestro_agents.predict import roles as roles_module
from maestro_agents.predict.roles import DEFAULT_OUTPUT_TOKENS, STATISTICS, WINDOW, RoleStatistics
from maestro_agents.predict.speed import EngineSpeeds
from maestro_agents.workflow import Workflows

ENGINE = EngineSpec(engine_id="a", url="u", model="m", prefill_s_per_token=0.001, decode_s_per_token=0.02)


def observation(
    output_tokens: int = 100,
    *,
    role: str = "r",
    model: str = "m",
    status: Status = Status.DONE,
    prompt_tokens: int = 10,
    cached_tokens: int = 0,
    service_s: float = 1.0,
    engine_id: str = "a",
    visit: int = 0,
) -> Observation:
    return Observation(
        stage_id="s", run_id="run", workflow="w", role=role, node="n", model=model, engine_id=engine_id,
        service_class=ServiceClass.BATCH, tenant="default", status=status, prompt_tokens=prompt_tokens,
        output_tokens=output_tokens, visit=visit, cached_tokens=cached_tokens, granted_at_s=1000.0, finished_at_s=1000.0 + service_s,
    )  # fmt: skip


def learned(*observations: Observation) -> RoleStatistics:
    statistics = RoleStatistics()
    statistics.observe(observations)
    return statistics


def predicted(statistics: RoleStatistics, *, role: str = "r", model: str = "m", **more: object):
    ticket = Ticket(stage_id="s", client_id="c", model=model, role=role, prompt_tokens=100).evolve(**more)
    return statistics.predict([ticket], {model: ENGINE}, Workflows())["s"]


# -- output lengths ------------------------------------------------------------------------------------------------------
def test_nothing_was_ever_observed() -> None:
    """The prior is said to be one, and gives numbers to work with."""
    p = predicted(RoleStatistics())
    assert p.basis == "prior"
    assert (p.output_tokens_p50, p.output_tokens_p99) == (DEFAULT_OUTPUT_TOKENS[1], DEFAULT_OUTPUT_TOKENS[2])
    assert p.service_s == pytest.approx(100 * 0.001 + p.output_tokens_mean * 0.02)


def test_a_role_learns_its_own_lengths() -> None:
    """Two roles of one model go apart; the median is near the truth after a few stages, exact after many."""
    few = learned(*[observation(20) for _ in range(5)])
    assert predicted(few).output_tokens_p50 == 20
    both = learned(*[observation(n, role=r) for r, n in (("short", 10), ("long", 900)) for _ in range(100)])
    short, long = predicted(both, role="short"), predicted(both, role="long")
    assert (short.output_tokens_p50, long.output_tokens_p50) == (10, 900)
    assert short.output_tokens_p90 == 10
    assert short.basis == "role(100)"
    assert short.service_s < long.service_s


def test_a_role_that_was_never_seen_is_like_its_agent_and_an_agent_like_everything() -> None:
    """The nearest level that knows anything speaks: visit, role on its model, role, agent, all."""
    statistics = learned(
        *[observation(7, role="shop:clerk") for _ in range(50)],
        *[observation(900, role="lab:planner", model="m2") for _ in range(50)],
    )
    assert predicted(statistics, role="shop:new").output_tokens_p50 == 7
    assert predicted(statistics, role="lab:new").output_tokens_p50 == 900
    assert predicted(statistics, role="shop:clerk", model="m2").output_tokens_p50 == 7
    assert predicted(statistics, role="shop:new").basis == "prior"
    assert 7 <= predicted(statistics, role="other:new").output_tokens_p50 <= 900
    assert predicted(RoleStatistics(), role="other:new").output_tokens_p50 == DEFAULT_OUTPUT_TOKENS[1]


def test_a_node_that_is_visited_again_has_statistics_of_its_own() -> None:
    """First visits may be long and later ones short; visits from the fifth on are one."""
    statistics = learned(*[observation(n, visit=v) for v, n in ((0, 800), (1, 20), (7, 5)) for _ in range(60)])
    found = [predicted(statistics, visit=v).output_tokens_p50 for v in (0, 1, 5, 99)]
    assert found == [800, 20, 5, 5]


def test_what_a_model_is_told_is_a_row_for_each_level() -> None:
    """As many numbers as `STATISTICS` has names; NaN where a level has no value yet."""
    statistics = learned(observation(7, role="shop:clerk"))
    told = dict(zip(STATISTICS, statistics.told(observation(role="shop:other")), strict=True))
    assert told["agent_p50_log"] == pytest.approx(math.log1p(7))
    assert (told["agent_n"], told["role_n"]) == (1, 0)
    assert math.isnan(told["role_p50_log"])


def test_a_role_that_changes_is_followed() -> None:
    """Only the latest stages count."""
    statistics = learned(*[observation(10) for _ in range(WINDOW)], *[observation(500) for _ in range(WINDOW)])
    assert predicted(statistics).output_tokens_p50 == 500
    assert predicted(statistics).basis == f"role({WINDOW})"


def test_the_callers_bound_caps_every_quantile() -> None:
    """``max_tokens`` is a promise of the engine; the role's statistics are not changed by it."""
    statistics = learned(*[observation(400) for _ in range(50)])
    p = predicted(statistics, max_tokens=50)
    assert {p.output_tokens_mean, p.output_tokens_p50, p.output_tokens_p90, p.output_tokens_p99} == {50}
    assert predicted(statistics).output_tokens_p50 == 400
    assert predicted(statistics, max_tokens=0).output_tokens_mean == 0


@pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED, Status.LOST])
def test_a_stage_that_did_not_end_well_teaches_nothing(status: Status) -> None:
    """Half an answer is no answer's length; nor is an answer without usage."""
    statistics = learned(observation(3, status=status), observation(0))
    assert predicted(statistics).basis == "prior"
    assert statistics.changed_p99() == {}


def test_p99_of_changed_roles_is_told_once() -> None:
    """What the fast path reserves, for those that changed since the last question."""
    statistics = learned(*[observation(30) for _ in range(200)], observation(70, role="x"))
    assert statistics.changed_p99() == {"m|r": 30, "m|x": pytest.approx(70, abs=50)}
    assert statistics.changed_p99() == {}
    statistics.observe([observation(90)])
    assert set(statistics.changed_p99()) == {"m|r"}


def test_roles_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were seen longest ago are forgotten; one that is seen again stays."""
    monkeypatch.setattr(roles_module, "MAX_ROLES", 3)
    statistics = learned(*[observation(10, role=f"r{i}") for i in range(3)])
    for i in (0, 3, 0, 4):
        statistics.observe([observation(10, role=f"r{i}")])
    known = [predicted(statistics, role=f"r{i}").basis for i in range(5)]
    assert known == ["role(3)", "prior", "role(1)", "role(1)", "role(1)"]
    assert "m|r1" not in statistics.changed_p99()
    assert len(statistics._windows) <= 5 * 3


@given(
    st.lists(st.integers(1, 100_000), max_size=300),
    st.lists(st.integers(1, 100_000), max_size=50),
    st.none() | st.integers(0, 5000),
)
def test_quantiles_are_ordered_and_within_what_was_seen(mine: list[int], others: list[int], bound: int | None) -> None:
    """For any history: p50 <= p90 <= p99, nothing beyond the values seen or assumed, nothing negative."""
    statistics = learned(*[observation(n, role="x") for n in others], *[observation(n) for n in mine])
    p = predicted(statistics, max_tokens=bound)
    values = [*mine[-WINDOW:], *others, *mine, *DEFAULT_OUTPUT_TOKENS]
    assert 0 <= p.output_tokens_p50 <= p.output_tokens_p90 <= p.output_tokens_p99 <= max(values)
    assert 0 <= p.output_tokens_mean <= max(values)
    assert p.service_s >= 0
    assert bound is None or p.output_tokens_p99 <= bound


# -- speeds --------------------------------------------------------------------------------------------------------------
def timed(prompt: int, output: int, *, prefill: float, decode: float, **more: object) -> Observation:
    return observation(
        output,
        prompt_tokens=prompt,
        service_s=prefill * prompt + decode * output,
        **more,  # type: ignore[arg-type]
    )


def test_an_engine_that_was_never_seen_is_as_fast_as_declared() -> None:
    """The fleet file's word, until completions teach better."""
    assert EngineSpeeds().of(ENGINE) == pytest.approx((0.001, 0.02, 0.02 / (2 * ENGINE.slots), 0.0))


def test_speeds_are_learned_per_engine() -> None:
    """Prefill and decode are told apart from mixed traffic; another engine is not touched."""
    speeds = EngineSpeeds()
    for i in range(200):
        speeds.observe(timed(200 + 97 * i % 3000, 50 + 31 * i % 500, prefill=0.0001, decode=0.005))
    prefill, decode, *_ = speeds.of(ENGINE)
    assert prefill == pytest.approx(0.0001, rel=0.3)
    assert decode == pytest.approx(0.005, rel=0.05)
    assert speeds.of(EngineSpec(engine_id="b", url="u", model="m", decode_s_per_token=0.1))[1] == 0.1


def test_an_engine_that_slows_down_is_followed() -> None:
    """Old completions fade."""
    speeds = EngineSpeeds()
    for decode in (0.005, 0.05):
        for i in range(300):
            speeds.observe(timed(500 + 37 * i % 1000, 100 + 13 * i % 200, prefill=0.0001, decode=decode))
    assert speeds.of(ENGINE)[1] == pytest.approx(0.05, rel=0.1)


def test_cached_prompt_tokens_cost_nothing() -> None:
    """A prefix hit does not make prefill look fast, nor decode slow."""
    speeds = EngineSpeeds()
    for i in range(200):
        prompt, output = 1000 + 97 * i % 2000, 50 + 31 * i % 300
        took_s = 0.001 * 200 + 0.01 * output
        speeds.observe(observation(output, prompt_tokens=prompt, cached_tokens=prompt - 200, service_s=took_s))
    assert speeds.of(ENGINE)[1] == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize(
    "bad", [observation(status=Status.FAILED), observation(0), observation(service_s=0.0), observation(service_s=-3.0)]
)
def test_what_tells_no_speed_is_ignored(bad: Observation) -> None:
    """A failure, an answer without usage, a clock that went backwards."""
    speeds = EngineSpeeds()
    speeds.observe(bad)
    assert speeds.of(ENGINE) == EngineSpeeds().of(ENGINE)


@given(
    st.lists(
        st.tuples(st.integers(0, 200_000), st.integers(1, 50_000), st.floats(1e-3, 1e4), st.integers(0, 200_000)),
        max_size=60,
    )
)
def test_speeds_are_finite_and_never_negative(rows: list[tuple[int, int, float, int]]) -> None:
    """For any completions, also collinear ones and those whose cache claims more than the prompt."""
    speeds = EngineSpeeds()
    for prompt, output, service_s, cached in rows:
        speeds.observe(observation(output, prompt_tokens=prompt, cached_tokens=cached, service_s=service_s))
    prefill, decode, *_ = speeds.of(ENGINE)
    assert 0 <= prefill < math.inf
    assert 0 < decode < math.inf
