"""Figures of a play, worked out on paper, and counted again by a script that knows nothing of ours (`tests/scorer.py`)."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from maestro_agents.core import EngineSpec, ServiceClass
from maestro_agents.policy import POLICIES
from maestro_agents.simulator.engine import EngineProfile
from maestro_agents.simulator.hardware import SimEngine
from maestro_agents.simulator.perfetto import Perfetto
from maestro_agents.simulator.score import Score, jain, quantile
from maestro_agents.simulator.workload import Foreseen, Run, Stage, Workload
from maestro_agents.simulator.world import EVENTS, Event, Outage, World
from tests import scorer

ONE_BY_ONE = EngineProfile(
    base_s=1.0, prefill_s_per_token=0.0, decode_s_per_seq=0.0, max_num_seqs=1, num_blocks=64, max_model_len=1024
)
"""A token a second, one call at a time, prompts for nothing."""


def engine(name: str = "a", cluster: str = "here", profile: EngineProfile = ONE_BY_ONE) -> SimEngine:
    spec = EngineSpec(
        engine_id=name, url="sim://", model="small", slots=profile.max_num_seqs, kv_bytes=100_000, kv_bytes_per_token=2,
        cluster=cluster, prefill_s_per_token=0.0, decode_s_per_token=1.0, max_model_len=1024,
    )  # fmt: skip
    return SimEngine(spec=spec, profile=profile, gpus=(f"{cluster}.{name}",))


def stage(output_tokens: int, **more: Any) -> Stage:
    said = Foreseen(
        output_tokens_mean=output_tokens,
        output_tokens_p50=output_tokens,
        output_tokens_p90=output_tokens,
        output_tokens_p99=output_tokens,
    )
    return Stage(role="r", model="small", prompt_tokens=10, output_tokens=output_tokens, foreseen=said, **more)


def workload(*runs: Run, horizon_s: float = 100.0, warmup_s: float = 0.0, window_s: float = 8.0) -> Workload:
    return Workload(name="w", runs=runs, warmup_s=warmup_s, window_s=window_s, horizon_s=horizon_s)


def a_run(name: str, at_s: float, deadline_s: float, *stages: Stage, batch: bool = False, tenant: str = "t") -> Run:
    return Run(
        run_id=name, app="app", session=name, at_s=at_s, deadline_s=deadline_s, stages=stages, tenant=tenant,
        service_class=ServiceClass.BATCH if batch else ServiceClass.INTERACTIVE,
    )  # fmt: skip


THREE = (
    a_run("a", 0.0, 5.0, stage(4)),
    a_run("b", 1.0, 6.0, stage(3), batch=True),
    a_run("c", 2.0, 5.0, stage(2), tenant="u"),
)
"""First come, first served: a has the engine from 0 to 4, b until 7, c until 9, two seconds late."""


def events_of(what: Workload, fleet: Sequence[SimEngine], policy: str = "fcfs", **more: Any) -> list[Event]:
    found: list[Event] = []
    World(what, fleet, POLICIES[policy], tell=found.append, **more).play()
    return found


def scored(events: Sequence[Event], window_s: float = 8.0) -> Score:
    score = Score(window_s=window_s)
    for event in events:
        score.take(event)
    return score


def counted_again(tmp_path: Path, events: Sequence[Event], what: Workload) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the independent script says of the same events, from a file."""
    path = tmp_path / "events.jsonl"
    head = {"maestro_events": 1, "window_s": what.window_s, "fields": EVENTS}
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *events)))
    ((found_head, found),) = scorer.plays(path)
    return scorer.figures(found_head, found)


def assert_same(ours: dict[str, float], theirs: dict[str, Any]) -> None:
    """Both have the same figures, and each is the same to one part in a billion."""
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        if theirs[name] is None:
            assert math.isnan(value), name
        else:
            assert value == pytest.approx(theirs[name], rel=1e-9, abs=1e-9), name


def test_attainment_completion_and_delay_are_those_worked_out_on_paper() -> None:
    """Three runs on one engine: who meets a deadline, how long each takes and waits, as drawn on paper."""
    found = scored(events_of(workload(*THREE), [engine()])).figures()
    assert (found["slo"], found["slo_interactive"], found["slo_batch"]) == (pytest.approx(2 / 3), 0.5, 1.0)
    assert (found["runs"], found["unended"], found["stages"]) == (3, 0, 3)
    assert found["completion_batch_p50_s"] == pytest.approx(6.0)  # 1 to 7
    assert found["completion_interactive_p50_s"] == pytest.approx((4.0 + 7.0) / 2)
    assert found["delay_interactive_mean_s"] == pytest.approx((0.0 + 5.0) / 2)
    assert found["longest_wait_s"] == pytest.approx(5.0)
    assert found["slowdown_mean"] == pytest.approx((4 / 4 + 6 / 3 + 7 / 2) / 3)
    assert found["slack_batch"] == pytest.approx(6 / 3)


def test_kv_is_reserved_from_grant_to_end_and_used_as_it_grows() -> None:
    """Two bytes a token: run a holds 14 tokens for 4 s; it uses its 10 prompt tokens for 4 s, its answer grows for 3 s."""
    found = scored(events_of(workload(THREE[0]), [engine()])).figures()
    assert found["kv_reserved_byte_s"] == pytest.approx(2 * 14 * 4)
    assert found["kv_used_byte_s"] == pytest.approx(2 * (10 * 4 + 4 * 3 / 2))
    assert found["kv_unused_byte_s"] == pytest.approx(112 - 92)


def test_throughput_and_batch_tokens_are_those_of_the_arrival_window() -> None:
    """By second 8 a's four tokens and b's three are written, c's two are not."""
    found = scored(events_of(workload(*THREE), [engine()])).figures()
    assert found["batch_tokens_in_window"] == 3
    assert found["output_tokens_per_s"] == pytest.approx(7 / 8)
    assert found["stages_per_s"] == pytest.approx(2 / 8)


def test_a_run_that_has_not_ended_has_missed_and_taken_until_the_end_of_play() -> None:
    """Play stops at 8 s: c had waited 5 s and runs; nothing of it is left out."""
    found = scored(events_of(workload(*THREE, horizon_s=8.0), [engine()])).figures()
    assert (found["runs"], found["unended"]) == (3, 1)
    assert found["slo_interactive"] == 0.5
    assert found["completion_interactive_p99_s"] == pytest.approx(quantile([4.0, 6.0], 0.99))
    early = scored(events_of(workload(*THREE, horizon_s=6.0), [engine()])).figures()
    assert early["longest_wait_s"] == pytest.approx(4.0)
    assert early["delay_interactive_p99_s"] == pytest.approx(quantile([0.0, 4.0], 0.99))


def test_runs_of_the_warm_up_are_played_and_not_counted() -> None:
    """With a warm-up of 1 s run a is none of the runs, but its tokens and KV are there."""
    found = scored(events_of(workload(*THREE, warmup_s=1.0), [engine()])).figures()
    assert found["runs"] == 2
    assert found["slo_interactive"] == 0.0
    assert found["output_tokens_per_s"] == pytest.approx(7 / 8)


def test_fairness_is_jains_index_of_the_tenants_attainments() -> None:
    """Tenant t attains all, u nothing: one of two has all, which is 1/2; where all are alike it is 1."""
    score = scored(events_of(workload(*THREE), [engine()]))
    assert score.tenants() == {
        "t": {"runs": 2, "slo": 1.0, "p95_s": pytest.approx(quantile([4.0, 6.0], 0.95))},
        "u": {"runs": 1, "slo": 0.0, "p95_s": pytest.approx(7.0)},
    }
    assert score.figures()["jain"] == pytest.approx(0.5)
    assert jain([0.7, 0.7, 0.7]) == pytest.approx(1.0)
    assert jain([0.0, 0.0]) == 1.0


def test_a_stage_whose_engine_died_has_waited_twice_and_its_memory_was_for_nothing() -> None:
    """The engine dies at 2 s and is back at 5 s: the only stage waits 3 s, and holds memory for 2 s in vain."""
    what = workload(a_run("a", 0.0, 50.0, stage(4)))
    found = scored(events_of(what, [engine()], outages=[Outage(cluster="here", from_s=2.0, to_s=5.0)])).figures()
    assert found["requeues"] == 1
    assert found["delay_interactive_mean_s"] == pytest.approx(3.0)
    assert found["kv_reserved_byte_s"] == pytest.approx(2 * 14 * (2 + 4))
    assert found["kv_used_byte_s"] == pytest.approx(92)


def test_starts_and_wakes_are_told_apart_by_where_the_weights_came_from(tmp_path: Path) -> None:
    """From host, disk or afar a server starts; one that slept wakes; going to sleep is neither."""
    moves = [("disk", "gpu"), ("remote", "gpu"), ("sleeping", "gpu"), ("dropped", "gpu"), ("gpu", "sleeping")]
    events: list[Event] = [("tier", 0.0, "g", "m", from_, to, 1.0) for from_, to in moves]
    events.append(("close", 8.0, 0, 0, 0, 0))
    found = scored(events).figures()
    assert (found["cold_starts"], found["wakes"]) == (2, 2)
    again, _ = counted_again(tmp_path, events, workload())
    assert (again["cold_starts"], again["wakes"]) == (2, 2)


def test_nothing_played_is_no_number() -> None:
    """Where nothing was counted a figure is nan, and no error."""
    found = scored([("close", 8.0, 0, 0, 0, 0)]).figures()
    assert math.isnan(found["slo"])
    assert math.isnan(found["completion_p99_s"])
    assert math.isnan(found["jain"])


@pytest.mark.parametrize("horizon_s", [4.5, 8.0, 1000.0])
def test_an_independent_script_counts_the_same(tmp_path: Path, horizon_s: float) -> None:
    """What never ended, what died with its engine, what was extended: the other script agrees to 1e-9 on every figure."""
    busy = EngineProfile(
        base_s=0.05, prefill_s_per_token=0.001, decode_s_per_seq=0.01, max_num_seqs=2, num_blocks=64, max_model_len=1024
    )
    runs = [
        a_run(
            f"r{n}", 0.1 * n, 2.0 + n % 3, stage(5 + n % 7), stage(90 * (n % 2) + 3, after=(0,), gap_s=0.3, shares=0, shared_tokens=12),
            batch=n % 3 == 0, tenant=f"t{n % 4}",
        )
        for n in range(30)
    ]  # fmt: skip
    # What is foreseen of long answers is a third of them: reservations are extended.
    what = workload(*runs, horizon_s=horizon_s, warmup_s=0.5, window_s=4.0)
    fleet = [engine("a", "here", busy), engine("b", "there", busy)]
    events = events_of(what, fleet, "ours-no-prediction", outages=[Outage(cluster="there", from_s=1.5, to_s=2.5)])
    score = scored(events, what.window_s)
    found, tenants = counted_again(tmp_path, events, what)
    ours = score.figures()
    assert_same(ours, found)
    assert ours["requeues"] > 0
    assert horizon_s < 100 or ours["extensions"] > 0
    assert bool(ours["unended"]) is (horizon_s < 100)
    assert set(tenants) == set(score.tenants())
    for name, own in score.tenants().items():
        assert_same(own, tenants[name])


def test_no_run_is_faster_than_alone() -> None:
    """The slowdown is at least 1: what a run takes alone on the fastest engine is a lower bound."""
    found = scored(events_of(workload(*THREE), [engine(), engine("b", profile=ONE_BY_ONE.faster(2))])).figures()
    assert found["slowdown_p50"] >= 1.0


def test_a_trace_to_look_at_holds_every_stage_on_a_lane_of_its_own() -> None:
    """Slices of one lane never overlap but for what is inside; runs begin and end; KV in use ends at zero."""
    file = io.StringIO()
    perfetto = Perfetto(file)
    two = EngineProfile(base_s=1.0, max_num_seqs=2, num_blocks=64, max_model_len=1024)
    runs = (*THREE, a_run("d", 3.0, 5.0, stage(2)))
    for event in [*events_of(workload(*runs), [engine(profile=two)])]:
        perfetto.take(event)
    perfetto.close()
    told = json.loads(file.getvalue())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in told if e["ph"] == "M"}
    assert sorted(names.values()) == ["a", "runs"]
    slices = [e for e in told if e["ph"] == "X" and e["name"] == "r"]
    assert sorted(e["args"]["run"] for e in slices) == ["a", "b", "c", "d"]
    assert {e["tid"] for e in slices} == {0, 1}
    for lane in (0, 1):
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if e["tid"] == lane)
        assert all(end <= start for (_, end), (start, _) in pairwise(own))
    assert sorted((e["ph"], e["id"]) for e in told if e["ph"] in "be") == [(p, r) for p in "be" for r in "abcd"]
    for name in ("KV used", "KV reserved"):
        values = [e["args"]["bytes"] for e in told if e["name"] == name]
        assert values[-1] == 0
        assert max(values) > 0
    queue = [e["args"]["stages"] for e in told if e["name"] == "stages that wait"]
    assert max(queue) == 2
    assert queue[-1] == 0


def test_a_trace_to_look_at_shows_when_models_come_and_go() -> None:
    """A GPU is a process, each model a lane of it, and a move a slice from its beginning until the model is there."""
    file = io.StringIO()
    perfetto = Perfetto(file)
    perfetto.take(("tier", 1.0, "g", "m", "disk", "gpu", 9.5))
    perfetto.close()
    named, lane, move = json.loads(file.getvalue())["traceEvents"][1:]
    assert (named["args"]["name"], lane["args"]["name"]) == ("GPU g", "m")
    assert (move["name"], move["ts"], move["dur"], move["tid"]) == ("disk to gpu", 1e6, 8.5e6, lane["tid"])
