"""Placement: which models are awake on which GPU; and GPUs that models share in the simulator."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_agents.core import Observation, ServiceClass, Status, Ticket
from maestro_agents.policy import OURS, POLICIES, Policy, placement
from maestro_agents.policy.placement import Board, Demand, GpuState, Resident, Sleep, Wake
from maestro_agents.simulator.engine import Engine, EngineProfile, EngineRequest
from maestro_agents.simulator.hardware import SimFleet, load_sim_fleet
from maestro_agents.simulator.workload import Run, Stage, Workload
from maestro_agents.simulator.world import Event, Outage, World
from maestro_agents.workflow import Workflows

GB = 10**9
PLACING = ("ours", "ours-no-prewake", "lru", "qlm", "no-colocation")
BIG = "qwen3-14b"  # one fits an A100 with 40 GB, two do not
SMALL = "qwen2.5-7b"


# -- boards --------------------------------------------------------------------------------------------------------------
def resident(model: str, tier: placement.Tier = "gpu", **changes: object) -> Resident:
    base = Resident(
        model=model, tier=tier, to=tier, hbm_bytes=30 * GB, ram_bytes=27 * GB, kv_floor_bytes=GB,
        kv_bytes=GB if tier == "gpu" else 0, wake_s={"gpu": 0.0, "sleeping": 1.5, "dropped": 10.0, "disk": 45.0}[tier],
        sleep_s=(1.5, 1.5), drop_s=(0.3, 10.0),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def board(*demands: Demand, gpus: Sequence[Sequence[Resident]], usable_gb: int = 40, ram_gb: int = 100) -> Board:
    return Board(
        gpus=[
            GpuState(gpu_id=f"g{n}", usable_bytes=usable_gb * GB, residents=there, ram_free_bytes=ram_gb * GB)
            for n, there in enumerate(gpus)
        ],
        demands={d.model: d for d in demands},
    )


def waiting(model: str, n: int = 1, each_s: float = 1.0, **more: float) -> Demand:
    return Demand(model=model, waiting=n, waited_s=n * each_s, oldest_at_s=100.0 - each_s, due_at_s=100.0, **more)  # type: ignore[arg-type]


def moves(found: Sequence[object]) -> list[object]:
    """Without KV budgets."""
    return [a for a in found if isinstance(a, Wake | Sleep)]


@pytest.mark.parametrize("name", PLACING)
def test_a_model_that_stages_wait_for_is_woken_where_there_is_room(name: str) -> None:
    """Every placement does that much, on the GPU that is free."""
    b = board(waiting("b", 3, 5.0), gpus=[[resident("a"), resident("b", "disk")], [resident("b", "sleeping")]])
    assert moves(POLICIES[name].place(b, 100.0)) == [Wake("g1", "b")]


@pytest.mark.parametrize("name", PLACING)
def test_with_nothing_to_do_nothing_is_done(name: str) -> None:
    """Models that are awake stay so while nobody waits for another one."""
    b = board(Demand(model="a", stages_per_s=1.0, work=3.0), gpus=[[resident("a"), resident("b", "disk")]])
    assert moves(POLICIES[name].place(b, 100.0)) == []


def test_a_swap_must_pay_for_what_others_miss() -> None:
    """One stage that just came does not put a busy model to sleep; many that waited do, and the least missed sleeps."""
    hot = Demand(model="a", stages_per_s=1.0, work=5.0)
    gpus = [[resident("a", running=4, drain_s=5.0, changed_at_s=0.0), resident("b", "sleeping")]]
    assert moves(placement.by_value(board(hot, waiting("b"), gpus=gpus), 100.0)) == []
    assert moves(placement.by_value(board(hot, waiting("b", 60, 30.0), gpus=gpus), 100.0)) == [
        Sleep("g0", "a", "sleeping", promised="b")
    ]
    cold = Demand(model="c", stages_per_s=0.01)
    gpus = [[resident("a"), resident("b", "sleeping")], [resident("c"), resident("b", "sleeping")]]
    found = moves(placement.by_value(board(hot, cold, waiting("b", 5, 5.0), gpus=gpus), 100.0))
    assert found == [Sleep("g1", "c", "sleeping", promised="b")]


def test_nobody_waits_for_its_model_beyond_the_patience() -> None:
    """Whatever it costs others: a single stage has its model woken after `PATIENCE_S`."""
    hot = Demand(model="a", stages_per_s=50.0, work=500.0)
    gpus = [[resident("a", running=60, drain_s=20.0), resident("b", "disk")]]
    almost = board(hot, waiting("b", 1, placement.PATIENCE_S - 1), gpus=gpus)
    assert moves(placement.by_value(almost, 100.0)) == []
    assert moves(placement.by_value(board(hot, waiting("b", 1, placement.PATIENCE_S), gpus=gpus), 100.0))


def test_a_model_is_not_put_to_sleep_within_its_dwell_nor_under_a_waiting_nested_stage() -> None:
    """Neither the one that just woke, nor the one that runs the parent of a stage that waits."""
    for kept in (resident("a", changed_at_s=99.0), resident("a", holds_parent=True)):
        b = board(waiting("b", 99, 60.0), gpus=[[kept, resident("b", "sleeping")]])
        assert moves(placement.by_value(b, 100.0)) == []
    for place in (placement.lru, placement.no_colocation, placement.qlm):
        b = board(waiting("b", 99, 60.0), gpus=[[resident("a", holds_parent=True), resident("b", "sleeping")]])
        assert moves(place(b, 100.0)) == []


def test_what_a_run_will_call_is_woken_before() -> None:
    """By its chance: what is unlikely, or too far away to matter yet, is left asleep; without foresight all is."""
    gpus = [[resident("a", "sleeping", wake_s=4.0)]]
    likely, rare, far = (Demand(model="a", foreseen=[f]) for f in ((3.0, 0.9), (3.0, 0.1), (60.0, 0.9)))
    assert moves(placement.by_value(board(likely, gpus=gpus), 100.0)) == [Wake("g0", "a")]
    assert moves(placement.by_value(board(rare, gpus=gpus), 100.0)) == []
    assert moves(placement.by_value(board(far, gpus=gpus), 100.0)) == []
    assert moves(placement.without_foresight(board(likely, gpus=gpus), 100.0)) == []


def test_a_hot_model_gets_a_replica_where_there_is_room() -> None:
    """On an idle GPU, when its own is crowded; and it sleeps again where it only crowds others."""
    a, b = (Demand(model=m, stages_per_s=2.0, work=8.0) for m in "ab")
    gpus = [[resident("a", busy=1.0), resident("b", busy=1.0)], [resident("a", "sleeping")]]
    assert moves(placement.by_value(board(a, b, gpus=gpus, usable_gb=80), 100.0)) == [Wake("g1", "a")]
    gpus = [[resident("a", busy=1.0), resident("b", busy=1.0)], [resident("a", busy=1.0)]]
    assert moves(placement.by_value(board(a, b, gpus=gpus, usable_gb=80), 100.0)) == [Sleep("g0", "a", "sleeping")]


def test_kv_memory_goes_to_those_who_use_it() -> None:
    """Everyone has its floor, all is given out, and who uses more gets more."""
    gpu = GpuState(
        gpu_id="g", usable_bytes=80 * GB, residents=[resident("a", usual_bytes=9e9), resident("b", usual_bytes=1e9)]
    )
    shares = placement.budgets(gpu)
    assert shares["a"] > 3 * shares["b"] > 3 * GB
    assert 20 * GB - 2 <= sum(shares.values()) <= 20 * GB
    assert len(set(placement.budgets(gpu, even=True).values())) == 1


def test_lru_puts_the_idle_model_to_sleep_that_was_used_least_recently() -> None:
    """Whatever it is worth."""
    there = [resident("a", used_at_s=90.0), resident("b", used_at_s=80.0), resident("c", "disk")]
    b = board(waiting("c"), gpus=[there], usable_gb=70)
    assert moves(placement.lru(b, 100.0)) == [Sleep("g0", "b", "sleeping", promised="c")]


def test_without_host_memory_weights_are_dropped() -> None:
    """Level 2: they come back from disk."""
    b = board(waiting("b", 9, 9.0), gpus=[[resident("a"), resident("b", "disk")]], ram_gb=1)
    assert moves(placement.by_value(b, 100.0)) == [Sleep("g0", "a", "dropped", promised="b")]


# -- what is learned for it ------------------------------------------------------------------------------------------------
def test_what_a_run_calls_next_is_learned_from_observations() -> None:
    """How often which model, and how soon after the stage; an end counts as no call."""
    known = Workflows()

    def seen(run: int, node: str, model: str, from_s: float, to_s: float) -> None:
        known.observe(
            Observation(
                stage_id=f"{run}{node}", run_id=str(run), workflow="w", role=node, node=node, model=model, status=Status.DONE,
                engine_id="e", service_class=ServiceClass.BATCH, tenant="t", prompt_tokens=5, output_tokens=5, pushed_at_s=from_s, granted_at_s=from_s,
                finished_at_s=to_s, visit=0, step=0, cached_tokens=0, run_started_at_s=0.0,
            )
        )  # fmt: skip

    for run in range(8):
        at_s = 100.0 * run
        seen(run, "plan", "large", at_s, at_s + 5.0)
        if run % 4:
            seen(run, "act", "small", at_s + 8.0, at_s + 9.0)
    ticket = Ticket(stage_id="s", client_id="c", model="large", role="plan", node="plan", workflow="w", run_id="9")
    (following,) = known.next_models(ticket)
    assert following.model == "small"
    assert following.expected == pytest.approx(6 / 8)
    assert following.gap_s == pytest.approx(3.0)
    assert known.next_models(dataclasses.replace(ticket, node="act", role="act")) == []


def test_engines_take_turns_on_a_gpu() -> None:
    """An engine beside another one takes twice its seconds, and its own again once it is alone."""
    ends: list[float] = []
    for turns_from_s, turns_to_s in ((math.inf, math.inf), (0.0, math.inf), (0.0, 2.0)):
        engine = Engine(EngineProfile())
        engine.submit(EngineRequest(request_id="r", prompt_tokens=100, output_tokens=500), 0.0)
        if turns_from_s == 0.0:
            engine.slow(2.0, 0.0)
        if turns_to_s < math.inf:
            engine.slow(1.0, turns_to_s)
        while not (ended := engine.ended(engine.next_end_s)):
            pass
        ends.append(ended[0].ended_at_s)
    assert ends[1] == pytest.approx(2 * ends[0], rel=0.02)
    assert ends[2] == pytest.approx(ends[0] + 1.0, rel=0.02)


# -- in the simulator -----------------------------------------------------------------------------------------------------
def fleet(path: Path, models: dict[str, str], *, gpus: int = 1, start: str = "a", ram_gb: int = 200) -> SimFleet:
    """GPUs of 40 GB, one to a node; the first runs ``start``."""
    text = "".join(
        f'[[gpu]]\nkind = "a100-40g"\nhost_ram_gb = {ram_gb}\nmodels = {[start] if n == 0 else []}\n'
        for n in range(gpus)
    ) + "".join(f'[[model]]\nname = "{m}"\nprofile = "{profile}"\nslots = 8\n' for m, profile in models.items())
    file = path / "fleet.toml"
    file.write_text(text.replace("'", '"'))
    return load_sim_fleet(file)


def chain(models: str, *, gap_s: float = 0.0, output_tokens: int = 100) -> tuple[Stage, ...]:
    """One stage after the other."""
    return tuple(
        Stage(
            role=f"r{n}", model=m, prompt_tokens=200, output_tokens=output_tokens, after=(n - 1,) if n else (),
            gap_s=gap_s if n else 0.0,
        )
        for n, m in enumerate(models)
    )  # fmt: skip


def workload(runs: Sequence[tuple[float, tuple[Stage, ...]]], horizon_s: float = 3000.0) -> Workload:
    return Workload(
        name="t", warmup_s=0.0, window_s=horizon_s, horizon_s=horizon_s,
        runs=tuple(
            Run(run_id=f"r{i}", app="app", session=f"s{i}", at_s=at_s, service_class=ServiceClass.BATCH, deadline_s=500.0, stages=s)
            for i, (at_s, s) in enumerate(runs)
        ),
    )  # fmt: skip


def play(what: Workload, on: SimFleet, policy: str | Policy, outages: Sequence[Outage] = ()) -> list[Event]:
    found: list[Event] = []
    World(what, on, POLICIES[policy] if isinstance(policy, str) else policy, tell=found.append, outages=outages).play()
    return found


def watched(place: placement.Place, see: Callable[[Board, float], None]) -> Policy:
    """Ours with a placement whose every board is looked at."""

    def looking(b: Board, now_s: float) -> list[placement.Action]:
        see(b, now_s)
        return place(b, now_s)

    return dataclasses.replace(OURS, place=looking)


def contended(n: int = 40, every_s: float = 3.0) -> Workload:
    """Three models in turn."""
    return workload([(every_s * i, chain("abcacb"[i % 3 : i % 3 + 3])) for i in range(n)])


THREE = {"a": BIG, "b": BIG, "c": SMALL}


@pytest.mark.parametrize("name", PLACING)
def test_every_run_ends_and_only_awake_models_serve(name: str, tmp_path: Path) -> None:
    """Nothing is lost, no stage is granted to a model that sleeps, drains or wakes, and none sleeps while it serves."""
    on = fleet(tmp_path, THREE, gpus=2)
    events = play(contended(), on, name)
    assert sum(e[0] == "done" for e in events) == 40
    awake_from: dict[str, float] = {"a.local.0.0": 0.0}
    serving: defaultdict[str, int] = defaultdict(int)
    where: dict[str, str] = {}
    for e in events:
        if e[0] == "tier":
            engine = f"{e[3]}.{e[2]}"
            if e[5] == "gpu":
                assert engine not in awake_from
                awake_from[engine] = e[6]
            else:
                assert serving[engine] == 0
                assert awake_from.pop(engine) <= e[1]
        elif e[0] == "grant":
            assert awake_from[e[3]] <= e[1]
            serving[e[3]] += 1
            where[e[2]] = e[3]
        elif e[0] == "end":
            serving[where[e[2]]] -= 1
        if name in {"qlm", "no-colocation"}:
            gpus = [engine.partition(".")[2] for engine in awake_from]
            assert len(gpus) == len(set(gpus)), "one model on a GPU at a time"


@pytest.mark.parametrize("name", PLACING)
def test_weights_and_kv_memory_never_exceed_the_hbm_nor_sleeping_models_the_host(name: str, tmp_path: Path) -> None:
    """On every board that a placement sees; room for one sleeping model only, the next is dropped."""
    seen: list[Board] = []

    def see(b: Board, _: float) -> None:
        seen.append(b)
        for gpu in b.gpus:
            there = [r for r in gpu.residents if r.in_hbm]
            assert sum(r.hbm_bytes + r.kv_bytes for r in there) <= gpu.usable_bytes
            assert all(r.kv_bytes >= r.kv_floor_bytes for r in there if r.to == "gpu")
            assert sum("sleeping" in {r.tier, r.to} for r in gpu.residents) <= 1
            assert gpu.ram_free_bytes >= 0

    events = play(contended(), fleet(tmp_path, THREE, ram_gb=35), watched(POLICIES[name].place, see))
    assert sum(e[0] == "done" for e in events) == 40
    assert len(seen) > 50
    assert {e[5] for e in events if e[0] == "tier"} == {"gpu", "sleeping", "dropped"}


def test_a_cold_start_is_waited_for_and_not_repeated(tmp_path: Path) -> None:
    """The first stage of a model waits until a server has started; the next ones find it awake."""
    events = play(
        workload([(10.0, chain("b")), (200.0, chain("b"))]), fleet(tmp_path, {"a": SMALL, "b": SMALL}), "ours"
    )
    (wake,) = [e for e in events if e[0] == "tier"]
    first, second = [e for e in events if e[0] == "grant"]
    assert wake[3:6] == ("b", "disk", "gpu")
    assert first[1] == wake[6] > 40.0
    assert second[1] == 200.0


def test_the_same_workload_gives_the_same_events(tmp_path: Path) -> None:
    """Byte for byte."""
    on = fleet(tmp_path, THREE, gpus=2)
    assert repr(play(contended(), on, "ours")) == repr(play(contended(), on, "ours"))


def test_a_wake_ahead_of_the_call_shortens_the_wait_of_a_chain(tmp_path: Path) -> None:
    """Two models that take turns on one GPU: once it is learned what follows, the second wakes while the run's tool runs."""
    plan, act = chain("ab", gap_s=20.0)
    runs = workload([(250.0 * i, (plan, act, act)) for i in range(11)])
    waited: dict[str, float] = {}
    for name in ("ours", "ours-no-prewake"):
        events = play(runs, fleet(tmp_path, {"a": BIG, "b": BIG}), name)
        ready = {e[2]: e[1] for e in events if e[0] == "ready"}
        waited[name] = sum(
            e[1] - ready[e[2]] for e in events if e[0] == "grant" and not e[2].endswith(".0") and e[1] > 1000.0
        )
    assert waited["ours"] < 0.1 * waited["ours-no-prewake"]


@settings(max_examples=15, deadline=None)
@given(every_s=st.floats(0.5, 8.0), period=st.integers(1, 12), output_tokens=st.integers(10, 600))
def test_alternating_demand_swaps_no_more_often_than_the_dwell(
    every_s: float, period: int, output_tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However it alternates, what has woken stays awake for its dwell, so the number of actions is bounded."""
    runs = [(every_s * i, chain("ab"[i // period % 2], output_tokens=output_tokens)) for i in range(60)]
    on = fleet(tmp_path_factory.mktemp("f"), {"a": BIG, "b": BIG})
    dwells: dict[str, float] = {}
    events = play(
        workload(runs), on, watched(OURS.place, lambda b, _: dwells.update({r.model: placement.dwell_s(r) for r in b.gpus[0].residents}))
    )  # fmt: skip
    woke_at_s: dict[str, float] = {}
    for e in events:
        if e[0] == "tier" and e[5] == "gpu":
            woke_at_s[e[3]] = e[6]
        elif e[0] == "tier" and e[3] in woke_at_s:
            assert e[1] - woke_at_s[e[3]] >= dwells[e[3]] - 1e-9
    assert sum(e[0] == "done" for e in events) == 60


def test_steady_demand_that_fits_comes_to_rest(tmp_path: Path) -> None:
    """Two models side by side, each called again and again: after the first wake nothing moves any more."""
    runs = workload([(2.0 * i, chain("ab"[i % 2])) for i in range(300)])
    tiers = [e for e in play(runs, fleet(tmp_path, {"a": SMALL, "b": SMALL}), "ours") if e[0] == "tier"]
    assert [e[3:6] for e in tiers] == [("b", "disk", "gpu")]


def test_a_node_that_dies_forgets_its_servers_and_loses_no_stage(tmp_path: Path) -> None:
    """What was awake starts cold once the node is back, and what it served or was about to is served then."""
    runs = workload([(5.0 * i, chain("abc"[i % 3], output_tokens=400)) for i in range(60)])
    events = play(runs, fleet(tmp_path, THREE), "ours", [Outage(cluster="local", from_s=120.0, to_s=180.0)])
    assert sum(e[0] == "done" for e in events) == 60
    assert not [e for e in events if e[0] in {"grant", "tier"} and 120.0 < e[1] < 180.0]
    after = [e for e in events if e[0] == "tier" and e[1] >= 180.0]
    assert after[0][4:6] == ("disk", "gpu")


def test_a_fleet_with_nothing_to_place_has_no_tiers(tmp_path: Path) -> None:
    """Where every model runs from the start nothing is woken or put to sleep, and no placement is asked."""

    def never(b: Board, now_s: float) -> list[placement.Action]:
        raise AssertionError(b, now_s)

    on = fleet(tmp_path, {"a": SMALL})
    events = play(workload([(1.0, chain("aa"))]), on, dataclasses.replace(OURS, place=never))
    assert [e[0] for e in events if e[0] in {"tier", "done"}] == ["done"]


def test_a_static_partition_moves_nothing_and_its_models_take_turns(tmp_path: Path) -> None:
    """Both models stay where the fleet starts them, each with its equal part of the KV memory; beside each other they are slower."""
    on = fleet(tmp_path, {"a": SMALL, "b": SMALL}, start='a", "b')
    boards: list[Board] = []
    gone = board(waiting("b", 60, 90.0), gpus=[[resident("a"), resident("b", "disk")]])
    assert placement.static(gone, 100.0) == []
    policy = dataclasses.replace(
        POLICIES["static"], place=watched(placement.static, lambda b, _: boards.append(b)).place
    )
    took: dict[str, float] = {}
    for models in ("a", "ab"):
        events = play(workload([(10.0, chain(m)) for m in models]), on, policy)
        assert not [e for e in events if e[0] == "tier"]
        took[models] = max(e[6] - e[4] for e in events if e[0] == "end")
    assert took["ab"] > 1.8 * took["a"]
    a, b = boards[-1].gpus[0].residents
    assert abs(a.kv_bytes - b.kv_bytes) < 0.01 * a.kv_bytes
    assert a.hbm_bytes + a.kv_bytes + b.hbm_bytes + b.kv_bytes <= boards[-1].gpus[0].usable_bytes


def test_a_wake_that_a_node_did_not_survive_is_made_again(tmp_path: Path) -> None:
    """It does not end when it would have: the server is started anew, and the stage waits for that one."""
    down = Outage(cluster="local", from_s=30.0, to_s=35.0)
    events = play(workload([(1.0, chain("b"))]), fleet(tmp_path, {"a": SMALL, "b": SMALL}), "ours", [down])
    first, second = [e for e in events if e[0] == "tier"]
    (grant,) = [e for e in events if e[0] == "grant"]
    assert first[6] > 30.0
    assert second[1] >= 35.0
    assert grant[1] == second[6]


@pytest.mark.parametrize("place", [placement.by_value, placement.lru])
def test_room_that_is_promised_is_not_taken_by_kv_memory_beside_it(place: placement.Place) -> None:
    """Those that stay get a budget that leaves the model that is to come its weights and its floor."""
    stays = resident("a", hbm_bytes=10 * GB, kv_bytes=30 * GB, used_at_s=99.0, changed_at_s=99.0)
    goes = resident("c", used_at_s=1.0)
    b = board(waiting("b", 50, 30.0), gpus=[[stays, goes, resident("b", "sleeping")]], usable_gb=72)
    found = place(b, 100.0)
    assert moves(found) == [Sleep("g0", "c", "sleeping", promised="b")]
    (left,) = [a for a in found if isinstance(a, placement.Budget) and a.model == "a"]
    assert left.kv_bytes <= (72 - 10 - 30 - 1) * GB
