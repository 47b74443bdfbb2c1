"""Memory that grows without end: the trend test is honest about chance, and engines are restarted in time, in turn."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import signal, stats

from maestro_agents.core import EngineSpec
from maestro_agents.nodes import EngineReport, GpuReport, NodeReport, Tier
from maestro_agents.policy import ageing
from maestro_agents.policy.ageing import Ageing, Samples, Watch, margin_s, rejuvenate, trend

Series = NDArray[np.float64]
GIB = 2.0**30
HOUR_S = 3600.0
LIMIT = 20 * GIB


def noise(rng: np.random.Generator, n: int, correlation: float, deviation: float = 1.0) -> Series:
    """A first-order autoregression in its steady state."""
    shocks = rng.standard_normal(n + 1000) * deviation * math.sqrt(1 - correlation**2)
    return signal.lfilter([1.0], [1.0, -correlation], shocks)[1000:]


def moments(hours: float) -> Series:
    return np.arange(0.0, hours * HOUR_S, ageing.SAMPLE_S)


def looks(values: Series, *, limit: float = LIMIT, every: int = 30) -> Iterator[tuple[float, Ageing | None]]:
    """What is said at each look of an engine whose memory is sampled every ten seconds."""
    samples = Samples()
    for i, value in enumerate(values):
        samples.add(i * ageing.SAMPLE_S, float(value))
        if i % every == 0:
            now_s = i * ageing.SAMPLE_S
            yield now_s, ageing.ageing("host memory", samples, limit=limit, now_s=now_s)


def alarms(values: Series, *, limit: float = LIMIT) -> list[float]:
    return [now_s for now_s, said in looks(values, limit=limit) if said]


def hamed_rao(values: Series) -> float:
    """The p value by Hamed & Rao (1998) as it is commonly programmed: all lags whose autocorrelation is significant."""
    n = len(values)
    at = np.arange(n)
    ranks = stats.rankdata(values - stats.theilslopes(values, at).slope * at)
    ranks -= ranks.mean()
    r = np.correlate(ranks, ranks, "full")[n:] / (ranks @ ranks)
    r[np.abs(r) < 1.96 / math.sqrt(n)] = 0.0
    k = np.arange(1, n)
    wider = 1 + 2 / (n * (n - 1) * (n - 2)) * float(np.sum((n - k) * (n - k - 1) * (n - k - 2) * r))
    z = stats.norm.isf(stats.kendalltau(at, values).pvalue / 2)
    return float(2 * stats.norm.sf(z / math.sqrt(max(1.0, wider))))


# -- the test ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("correlation", "most"), [(0.0, 0.08), (0.3, 0.09), (0.5, 0.10), (0.7, 0.11)])
def test_noise_without_a_trend_is_called_one_hardly_more_often_than_the_level_says(
    correlation: float, most: float
) -> None:
    """At a level of 5 %, also where neighbouring samples resemble each other."""
    rng = np.random.default_rng(1)
    found = [trend(list(enumerate(noise(rng, 64, correlation)))).p <= 0.05 for _ in range(300)]
    assert np.mean(found) <= most


def test_the_usual_forms_of_the_test_call_such_noise_a_trend() -> None:
    """Why ours is another: of the same series the plain test and Hamed & Rao's call several times as many a trend."""
    rng = np.random.default_rng(1)
    series = [noise(rng, 64, 0.7) for _ in range(300)]
    plain = np.mean([stats.kendalltau(np.arange(64), s).pvalue <= 0.05 for s in series])
    corrected = np.mean([hamed_rao(s) <= 0.05 for s in series])
    ours = np.mean([trend(list(enumerate(s))).p <= 0.05 for s in series])
    print(f"5 % is: plain {plain:.0%}, Hamed & Rao {corrected:.0%}, ours {ours:.0%}")
    assert plain > 0.3
    assert corrected > 2 * ours


def test_a_trend_is_found_in_correlated_noise() -> None:
    """A growth of three standard deviations over the time watched is found in nine of ten series."""
    rng = np.random.default_rng(2)
    line = np.linspace(0.0, 3.0, 128)
    found = [trend(list(enumerate(line + noise(rng, 128, 0.5)))).p <= ageing.ALPHA for _ in range(100)]
    assert np.mean(found) >= 0.9


def test_the_slopes_interval_holds_the_slope() -> None:
    """In nine of ten series of correlated noise, where the interval for independent noise holds it in fewer than eight."""
    rng = np.random.default_rng(3)
    at = np.arange(96)
    ours, independent = 0, 0
    for _ in range(200):
        values = 0.02 * at + noise(rng, 96, 0.6)
        found, sen = trend(list(zip(at.tolist(), values.tolist(), strict=True))), stats.theilslopes(values, at)
        ours += found.low_per_s <= 0.02 <= found.high_per_s
        independent += sen.low_slope <= 0.02 <= sen.high_slope
    assert ours / 200 >= 0.9
    assert independent / 200 < 0.8


@pytest.mark.parametrize("teeth", [1.3, 1.5, 1.7, 1.9])
def test_what_came_down_once_does_not_last(teeth: float) -> None:
    """A sawtooth's second rise looks like a trend to any test; that its floor came back gives it away."""
    at_s = np.linspace(0.0, 1.0, 96)
    found = trend(list(zip(at_s.tolist(), ((at_s * teeth) % 1.0).tolist(), strict=True)))
    assert not found.lasting
    assert trend(list(zip(at_s.tolist(), (at_s * teeth).tolist(), strict=True))).grows


@pytest.mark.parametrize("settles", [1.2, 2.0, 4.0])
def test_what_flattens_does_not_last(settles: float) -> None:
    """It grows in every part of the time watched, and so has a trend; in the later half it grows by far less."""
    at_s = np.linspace(0.0, 1.0, 96)
    found = trend(list(zip(at_s.tolist(), (1 - np.exp(-at_s * settles)).tolist(), strict=True)))
    assert found.low_per_s > 0
    assert not found.lasting


def test_memory_that_stands_still_has_no_trend() -> None:
    """A constant is no trend, whatever its value."""
    still = trend([(float(t), 7.0) for t in range(100)])
    assert (still.p, still.slope_per_s, still.grows) == (1.0, 0.0, False)


# -- alarms --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_a_day_of_noise_raises_no_alarm(correlation: float) -> None:
    """An engine whose memory wavers by a tenth of what it has left is looked at every five minutes for a day."""
    rng = np.random.default_rng(4)
    assert alarms(10 * GIB + noise(rng, len(moments(24)), correlation, GIB)) == []


@pytest.mark.parametrize("period_s", [60.0, 600.0, 3600.0, 7200.0])
def test_a_sawtooth_raises_no_alarm(period_s: float) -> None:
    """What a garbage collector gives back again and again is no leak, however long it takes."""
    at_s = moments(12)
    for phase in (0.0, 0.35, 0.7):
        teeth = 2 * GIB * ((at_s / period_s + phase) % 1.0)
        assert alarms(10 * GIB + teeth + noise(np.random.default_rng(5), len(at_s), 0.9, 0.02 * GIB)) == []


@pytest.mark.parametrize("settles_s", [60.0, 300.0, 900.0, 1800.0])
def test_warming_up_raises_no_alarm(settles_s: float) -> None:
    """Growth that flattens, exponentially or as a logarithm, is no leak."""
    at_s = moments(12)
    wavers = noise(np.random.default_rng(6), len(at_s), 0.9, 0.02 * GIB)
    assert alarms(10 * GIB + 3 * GIB * (1 - np.exp(-at_s / settles_s)) + wavers) == []
    assert alarms(10 * GIB + GIB * np.log1p(at_s / settles_s) + wavers) == []


@pytest.mark.parametrize("per_hour", [0.5, 2.0, 20.0])
def test_a_leak_is_told_long_before_the_memory_is_full(per_hour: float) -> None:
    """By half of the way at the latest, and the predicted moment is not after the true one."""
    full_s = 10 / per_hour * HOUR_S
    at_s = moments(full_s / HOUR_S)
    leak = 10 * GIB + per_hour * GIB * at_s / HOUR_S + noise(np.random.default_rng(7), len(at_s), 0.9, 0.1 * GIB)
    said = [(now_s, a) for now_s, a in looks(leak) if a]
    assert said[0][0] <= 0.5 * full_s
    late = [a.exhausted_at_s for now_s, a in said if now_s >= 0.5 * full_s]
    assert late
    assert max(late) <= 1.02 * full_s
    assert min(late) >= 0.6 * full_s


def test_a_leak_beneath_a_sawtooth_is_found_and_full_is_where_its_teeth_are() -> None:
    """The floor shows the leak; what fails is the peak, so the moment is earlier than the floor's."""
    at_s = moments(6.8)
    teeth = 3 * GIB * ((at_s / 1200) % 1.0)
    values = 10 * GIB + GIB * at_s / HOUR_S + teeth + noise(np.random.default_rng(8), len(at_s), 0.9, 0.02 * GIB)
    said = [a for now_s, a in looks(values, limit=LIMIT) if a and now_s > 5 * HOUR_S]
    assert said
    assert all(6.0 * HOUR_S <= a.exhausted_at_s <= 7.1 * HOUR_S for a in said)


def test_the_evidence_is_said_in_words() -> None:
    """What grows, how fast within what bounds, how surely, and when it is full."""
    at_s = moments(2)
    values = 10 * GIB + 2 * GIB * at_s / HOUR_S + noise(np.random.default_rng(9), len(at_s), 0.5, 0.05 * GIB)
    said = [a for _, a in looks(values) if a][-1]
    number = r"([\d.]+)"
    words = rf"host memory grows {number} GiB an hour \({number} GiB to {number} GiB; p < 0\.001 over {number} h\): "
    found = re.fullmatch(words + rf"full in {number} h at the earliest", said.words)
    assert found
    slope, low, high, span_h, full_h = map(float, found.groups())
    assert 1.8 < low < slope < high < 2.2
    assert span_h == pytest.approx(2.0, abs=0.15)
    assert full_h == pytest.approx(3.0, abs=0.3)


def test_memory_that_is_full_already_is_full_now() -> None:
    """A limit that has been passed is no negative time."""
    at_s = moments(1)
    last_s, said = list(looks(10 * GIB + 2 * GIB * at_s / HOUR_S, limit=11 * GIB))[-1]
    assert said is not None
    assert said.exhausted_at_s == last_s


def test_the_more_pressing_of_host_and_device_memory_is_told() -> None:
    """Both are watched; where both grow, the one that is full first is the reason."""
    watch, said = Watch(), None
    for at_s in moments(1):
        host, device = int(10 * GIB + GIB * at_s / HOUR_S), int(70 * GIB + GIB * at_s / HOUR_S)
        said = watch.look(
            float(at_s),
            host_bytes=host,
            host_left_bytes=int(13 * GIB) - host,
            device_bytes=device,
            device_left_bytes=int(72 * GIB) - device,
        )
    assert said is not None
    assert said.words.startswith("device memory grows")
    assert said.exhausted_at_s == pytest.approx(2 * HOUR_S, rel=0.05)


def test_memory_that_is_not_known_is_not_judged() -> None:
    """An engine that says nothing of its memory (-1) has no trend."""
    watch = Watch()
    assert not any(watch.look(float(t), host_bytes=-1, host_left_bytes=0) for t in moments(1))


# -- samples -------------------------------------------------------------------------------------------------------------
def test_samples_stay_few_and_lose_no_extreme() -> None:
    """A week of samples fits into the same few blocks; the least and most of what they span are kept."""
    samples = Samples()
    rng = np.random.default_rng(10)
    values = rng.uniform(1.0, 2.0, int(7 * 24 * HOUR_S / 10))
    for i, value in enumerate(values):
        samples.add(i * 10.0, float(value))
    blocks = samples.blocks
    assert ageing.MOST // 2 <= len(blocks) <= ageing.MOST
    assert samples.block_s == ageing.LONGEST_S
    kept = values[round(blocks[0].at_s / 10) : round((blocks[-1].at_s + samples.block_s) / 10)]
    assert min(b.low for b in blocks) == min(kept)
    assert max(b.high for b in blocks) == max(kept)


def test_nothing_is_said_of_a_server_that_has_just_come_up() -> None:
    """Ten minutes pass before the first verdict, however steep the growth."""
    at_s = moments(1)
    first_s = alarms(10 * GIB + 20 * GIB * at_s / HOUR_S)[0]
    assert first_s >= ageing.LEAST * ageing.SAMPLE_S


# -- the decision ----------------------------------------------------------------------------------------------------------
def engine(
    name: str, *, model: str = "m", full_in_s: float = 0.0, tier: Tier = "gpu", to: Tier = "gpu"
) -> EngineReport:
    """One engine at moment 1000; ``full_in_s`` 0: it does not age."""
    return EngineReport(
        spec=EngineSpec(engine_id=name, url="", model=model, slots=8),
        gpu_id=name,
        tier=tier,
        to=to,
        wake_s={"disk": 60.0, "host": 40.0},
        leave_s={"disk": 10.0},
        running=0,
        ageing="host memory grows" if full_in_s else "",
        exhausted_at_s=1000.0 + full_in_s if full_in_s else 0.0,
    )


def restarts(
    *engines: EngineReport, waiting: int = 0, pending: Sequence[str] = (), model: str = "m", now_s: float = 1000.0
) -> list[str]:
    gpus = [GpuReport(gpu_id=e.gpu_id, memory_bytes=1, usable_bytes=1) for e in engines]
    report = NodeReport(node_id="n", gpus=gpus, engines=engines)
    return rejuvenate([report], waiting={model: waiting}, pending=pending, now_s=now_s)


def running(e: EngineReport, n: int) -> EngineReport:
    return dataclasses.replace(e, running=n)


def test_an_engine_that_does_not_age_is_left_alone() -> None:
    """Nothing is restarted for nothing."""
    assert restarts(engine("a"), engine("b")) == []


def test_a_restart_is_not_made_days_before() -> None:
    """Far from the limit an alarm is shown, no more."""
    assert restarts(engine("a", full_in_s=ageing.EARLY_S + 1)) == []
    assert restarts(engine("a", full_in_s=ageing.EARLY_S)) == ["a"]


def test_replicas_are_restarted_one_after_the_other() -> None:
    """The most pressing first; the next waits until that one is back."""
    a, b = engine("a", full_in_s=900.0), engine("b", full_in_s=300.0)
    assert restarts(a, b) == ["b"]
    assert restarts(a, b, pending=["b"]) == []
    assert restarts(a, engine("b", tier="disk", to="disk")) == ["a"]
    assert restarts(a, engine("b", tier="disk", to="gpu")) == []


def test_models_do_not_wait_for_each_other() -> None:
    """One of each model at a time."""
    assert restarts(engine("a", full_in_s=300.0), engine("b", model="other", full_in_s=400.0)) == ["a", "b"]


def test_the_last_awake_replica_is_kept_while_stages_wait() -> None:
    """Whatever its memory does; asleep replicas serve nobody."""
    a = engine("a", full_in_s=1.0)
    assert restarts(a, waiting=1) == []
    assert restarts(a, engine("b", tier="sleeping", to="sleeping"), waiting=1) == []
    assert restarts(a, engine("b", to="sleeping"), waiting=1) == []
    assert restarts(a, engine("b"), waiting=1) == ["a"]
    assert restarts(a, waiting=0) == ["a"]


def test_a_load_peak_is_waited_for_while_there_is_time() -> None:
    """With an hour left a quiet moment is waited for, with minutes left it is not."""
    far, near = engine("a", full_in_s=HOUR_S), engine("a", full_in_s=margin_s(engine("a")))
    other = engine("b")
    assert restarts(far, other, waiting=3) == []
    assert restarts(running(far, 3), running(other, 2)) == []
    assert restarts(running(far, 2), running(other, 2)) == ["a"]
    assert restarts(running(far, -1), other) == []
    assert restarts(near, other, waiting=3) == ["a"]


def test_an_engine_that_does_not_serve_is_not_restarted() -> None:
    """What sleeps, drains or is gone does not grow."""
    for tier, to in (("sleeping", "sleeping"), ("gpu", "sleeping"), ("disk", "disk")):
        assert restarts(engine("a", full_in_s=10.0, tier=tier, to=to)) == []


def test_the_margin_is_several_restarts_wide() -> None:
    """A large model that takes ten minutes to start is restarted half an hour before."""
    slow = dataclasses.replace(engine("a"), wake_s={"disk": 600.0}, leave_s={"disk": 20.0})
    assert margin_s(slow) == ageing.MARGIN * 620.0
    assert margin_s(engine("a")) == ageing.MARGIN_S
    assert margin_s(dataclasses.replace(slow, wake_s={}, leave_s={})) == max(
        ageing.MARGIN_S, ageing.MARGIN * ageing.RESTART_S
    )


def test_leaking_replicas_under_load_never_fill_their_memory_and_never_all_rest() -> None:
    """Three replicas that leak for a day at a constant load: each is restarted in time, two always serve."""
    names, took_s, full_s = ("a", "b", "c"), 300.0, {"a": 5 * HOUR_S, "b": 5.2 * HOUR_S, "c": 7 * HOUR_S}
    born_s = dict.fromkeys(names, 0.0)
    back_s: dict[str, float] = {}
    count = 0
    for now_s in np.arange(0.0, 24 * HOUR_S, 30.0):
        back_s = {n: s for n, s in back_s.items() if s > now_s}
        fleet = [
            engine(n, tier="disk", to="gpu")
            if n in back_s
            else dataclasses.replace(engine(n), running=6, exhausted_at_s=born_s[n] + full_s[n])
            for n in names
        ]
        assert len(back_s) <= 1
        assert all(now_s < born_s[n] + full_s[n] for n in names if n not in back_s)
        for n in restarts(*fleet, waiting=4, now_s=float(now_s)):
            back_s[n] = now_s + took_s
            born_s[n] = now_s + took_s
            count += 1
    assert 10 <= count <= 14
