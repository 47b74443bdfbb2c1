"""What a node does next: found by a function, held to its laws for any wishes and any order of events."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_agents.nodes import MOVES, Tier, Want
from maestro_serving.elastic_kv import KvLedger
from maestro_serving.reconcile import Announce, Go, Standing, plan
from maestro_serving.weights import DOES, HAS_SERVER, way

GB = 10**9


def standing(name="a", tier="disk", **about):
    about = {
        "gpus": ("g",),
        "to": tier,
        "fixed_bytes": 16 * GB,
        "floor_bytes": 2 * GB,
        "weight_bytes": 14 * GB,
        **about,
    }
    return Standing(engine_id=name, tier=tier, **about)


def held(*engines, usable=40 * GB):
    """The ledger of one GPU with those of these engines that are in it."""
    ledger = KvLedger(usable_bytes=usable)
    for e in engines:
        if "gpu" in {e.tier, e.to if e.moving else e.tier}:
            assert ledger.enter(e.engine_id, fixed_bytes=e.fixed_bytes, floor_bytes=e.floor_bytes, kv_bytes=e.kv_bytes)
    return {"g": ledger}


def steps(*engines, usable=40 * GB, ram=100 * GB, now_s=0.0, **wants):
    wishes = {name: Want(tier=tier) for name, tier in wants.items()}
    return plan(engines, wishes, held(*engines, usable=usable), ram_bytes=ram, now_s=now_s)


def test_a_table_says_what_each_move_does():
    """Every move that the nodes' table allows is somebody's doing, and nothing else is."""
    assert set(DOES) == {(was, to) for was, tiers in MOVES.items() for to in tiers}


def test_what_is_where_it_shall_be_is_left_alone():
    """A wish said twice changes nothing."""
    assert steps(standing(tier="gpu"), standing("b"), a="gpu", b="disk") == []
    assert steps(standing(tier="gpu"), standing("b")) == []


def test_an_engine_is_announced_first_and_moves_once_it_is_idle():
    """A sleep begins by taking nothing new; it happens when the metrics agree that nothing runs."""
    assert steps(standing(tier="gpu"), a="sleeping") == [Announce("a", "sleeping")]
    assert steps(standing(tier="gpu", to="sleeping"), a="sleeping") == []
    assert steps(standing(tier="gpu", to="sleeping", idle=True), a="sleeping") == [Go("a", "sleeping")]


def test_a_wish_that_was_only_announced_is_taken_back():
    """It still serves: it is told so, and nothing has moved."""
    assert steps(standing(tier="gpu", to="sleeping"), a="gpu") == [Announce("a", "gpu")]


def test_a_move_that_has_begun_is_waited_for():
    """One move at a time: a new wish changes nothing until then."""
    assert steps(standing(tier="gpu", to="sleeping", moving=True, idle=True), a="gpu") == []


def test_a_wake_waits_for_room_and_takes_it_from_its_first_second():
    """Two that each fit do not both fit: the first that is named goes, the other stays where it is."""
    a, b = standing("a", "sleeping", floor_bytes=8 * GB), standing("b", "dropped", floor_bytes=8 * GB)
    assert steps(a, b, b="gpu", a="gpu") == [Go("b", "gpu")]
    assert steps(standing("c", "gpu", floor_bytes=8 * GB), a, c="sleeping", a="gpu") == [Announce("c", "sleeping")]


def test_room_that_somebody_waits_for_is_not_taken_by_a_later_wish():
    """A small model does not slip into the room that a large one is promised; into room that can never do, it does."""
    c, small = standing("c", "gpu"), standing("s", "disk", fixed_bytes=10 * GB)
    assert Go("s", "gpu") not in steps(
        c, standing("l", "sleeping", fixed_bytes=30 * GB), small, c="sleeping", l="gpu", s="gpu"
    )
    assert steps(c, standing("l", "sleeping", fixed_bytes=50 * GB), small, l="gpu", s="gpu") == [Go("s", "gpu")]


def test_sleeping_weights_fit_host_memory():
    """Two want to sleep where one has room: the other stays as it is, and is not even announced."""
    a, b = standing("a", "gpu", idle=True), standing("b", "gpu", idle=True)
    assert steps(a, b, ram=20 * GB, a="sleeping", b="sleeping") == [Go("a", "sleeping")]
    assert steps(standing("a", "sleeping"), b, ram=20 * GB, b="sleeping") == []
    assert steps(standing("a", "sleeping"), b, ram=28 * GB, b="sleeping") == [Go("b", "sleeping")]


def test_a_longer_way_is_made_of_moves():
    """From one sleep level to the other by the GPU, into the page cache from the disk first."""
    assert way("sleeping", "dropped", {}, frozenset(MOVES)) == ["gpu", "dropped"]
    assert way("disk", "sleeping", {}, frozenset(MOVES)) == ["gpu", "sleeping"]
    assert way("remote", "gpu", {}, frozenset(MOVES)) == ["disk", "gpu"]
    assert way("gpu", "remote", {}, frozenset(MOVES)) == []


def test_an_engine_that_cannot_sleep_stays():
    """A server whose admin endpoints nobody may use is moved nowhere that it cannot be in."""
    assert steps(standing(tier="gpu", idle=True, can=frozenset({"gpu", "disk"})), a="sleeping") == []


def test_a_move_that_failed_is_tried_later():
    """Until its back-off is over an engine rests, and says so."""
    late = standing(tier="sleeping", to="gpu", ready_at_s=5.0)
    assert steps(late, a="gpu", now_s=4.0) == [Announce("a", "sleeping")]
    assert steps(late, a="gpu", now_s=5.0) == [Go("a", "gpu")]


def test_a_restart_is_drained_like_any_move():
    """Rejuvenation ends a server only once it is idle, and then has it started again."""
    assert steps(standing(tier="gpu", restart=True), a="gpu") == [Announce("a", "disk")]
    assert steps(standing(tier="gpu", to="disk", idle=True, restart=True), a="gpu") == [Go("a", "disk")]
    assert steps(standing(tier="disk", restart=False), a="gpu") == [Go("a", "gpu")]


def test_an_engine_on_two_gpus_takes_room_on_both_or_none():
    """What fits only one of its GPUs waits, and holds nothing."""
    ledgers = {"g": KvLedger(usable_bytes=40 * GB), "h": KvLedger(usable_bytes=10 * GB)}
    wide = standing(gpus=("g", "h"))
    assert plan([wide], {"a": Want(tier="gpu")}, ledgers, ram_bytes=0, now_s=0.0) == []
    assert ledgers["g"].held_bytes == 0
    ledgers["h"].usable_bytes = 40 * GB
    assert plan([wide], {"a": Want(tier="gpu")}, ledgers, ram_bytes=0, now_s=0.0) == [Go("a", "gpu")]


# -- the laws, for any wishes and any order of events --------------------------------------------------------------------
TIERS: list[Tier] = ["gpu", "sleeping", "dropped", "host", "disk"]
SIZES = {"a": 16, "b": 14, "c": 30, "d": 9, "e": 22}


class World:
    """Engines whose moves take their time and may fail; every step of the plan is checked against the laws."""

    def __init__(self) -> None:
        self.usable, self.ram = {"g": 50 * GB, "h": 40 * GB}, 30 * GB
        self.ledgers = {g: KvLedger(usable_bytes=n) for g, n in self.usable.items()}
        self.engines = {
            name: standing(
                name, gpus=("gh"[n % 2],), fixed_bytes=size * GB, weight_bytes=size * GB, can=frozenset(TIERS)
            )
            for n, (name, size) in enumerate(SIZES.items())
        }
        self.running = dict.fromkeys(SIZES, 0)
        self.wants: dict[str, Want] = {}

    def change(self, name: str, **what) -> None:
        self.engines[name] = dataclasses.replace(self.engines[name], **what)

    def step(self) -> list:
        for name in self.engines:
            self.change(name, idle=not self.running[name])
        found = plan(list(self.engines.values()), self.wants, self.ledgers, ram_bytes=self.ram, now_s=0.0)
        for step in found:
            e = self.engines[step.engine_id]
            assert not e.moving
            if isinstance(step, Go):
                assert (e.tier, step.to) in DOES
                assert not (e.tier == "gpu" and self.running[e.engine_id]), "something would have been aborted"
            self.change(e.engine_id, to=step.to, moving=isinstance(step, Go))
        self.check()
        return found

    def end(self, name: str, well: bool) -> None:
        e = self.engines[name]
        if not e.moving:
            return
        there = e.to if well else e.tier
        if there != "gpu":
            for gpu in e.gpus:
                self.ledgers[gpu].leave(name)
        self.change(name, tier=there, to=there, moving=False)
        self.check()

    def check(self) -> None:
        for gpu, usable in self.usable.items():
            there = [
                e for e in self.engines.values() if gpu in e.gpus and (e.tier == "gpu" or (e.moving and e.to == "gpu"))
            ]
            assert sum(e.fixed_bytes + e.floor_bytes for e in there) <= usable
            assert {e.engine_id for e in there} == {n for n in self.engines if n in self.ledgers[gpu]}
        asleep = [e for e in self.engines.values() if e.tier == "sleeping" or (e.moving and e.to == "sleeping")]
        assert sum(e.weight_bytes for e in asleep) <= self.ram


names = st.sampled_from(sorted(SIZES))
events = st.one_of(
    st.tuples(st.just("want"), names, st.sampled_from(TIERS)),
    st.tuples(st.just("end"), names, st.booleans()),
    st.tuples(st.just("run"), names, st.integers(0, 2)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(events, max_size=60))
def test_memory_holds_and_nothing_is_aborted_whatever_is_wanted(happens):
    """At no instant is more in HBM or host memory than there is; no engine moves that runs something; and once wishes that fit
    together stand still, they come true.
    """
    world = World()
    world.step()
    for what, name, how in happens:
        if what == "want":
            world.wants[name] = Want(tier=how)
        elif what == "end":
            world.end(name, how)
        elif how == 0 or (world.engines[name].tier == "gpu" == world.engines[name].to):
            world.running[name] = how  # only what takes stages gets some
        world.step()
    goal: dict[str, Tier] = {"a": "gpu", "b": "gpu", "c": "gpu", "d": "sleeping", "e": "disk"}
    world.wants = {name: Want(tier=tier) for name, tier in goal.items()}
    world.running = dict.fromkeys(SIZES, 0)
    for _ in range(30):
        world.step()
        for name in SIZES:
            world.end(name, True)
    assert {n: e.tier for n, e in world.engines.items()} == goal


@pytest.mark.parametrize("tier", sorted(HAS_SERVER))
def test_every_server_can_be_ended(tier):
    """From wherever it is a server goes to the disk in one move."""
    assert way(tier, "disk", {}, frozenset(MOVES)) == ["disk"]
