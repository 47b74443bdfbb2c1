"""KV memory that several engines of a GPU share: who may promise how much, who may hold how much, and what is done when it runs short.

Two numbers per engine. Its *budget* is what the scheduler may promise there; all budgets together may be `MAX_FACTOR` times
the KV memory that there is (arXiv 2606.12950 reports 3.05x), since stages seldom need all that is reserved for them. Its
*limit* is what it may hold, and the limits never come to more than there is: memory goes to another engine only after
the one that had it was seen without it. So HBM is never over-committed, whatever the budgets promised.

That takes an engine that obeys a limit (``enforced``: kvcached, the emulator). Stock vLLM allocates its KV memory at
start: it counts with all of it, whatever it uses, and its budget is a matter of admission (``accounted``); no HBM is freed by it.

How hard pressed a GPU is (`guard`), by how much of the elastic memory (all but every engine's floor) is in use:

- ``normal``: budgets may be over-subscribed.
- ``tight``: they may not: nothing new is promised that is not there.
- ``paused``: nothing new is granted; what runs has the rest.
- ``preempting``: engines with the cheapest batch work are limited to less than they hold. vLLM then preempts its
  lowest-priority requests, and recomputes them later. Nobody is left with less than its interactive requests hold, or than its
  floor: a request that could never fit would wait forever (vllm-project/vllm#35570).

A level is entered at one pressure and left at a lower one; while paused or preempting, who was preempted gets nothing back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from maestro_agents.nodes import Elastic

Level = Literal["normal", "tight", "paused", "preempting"]
LEVELS: Final[tuple[Level, ...]] = get_args(Level)

ENTER: Final[Mapping[Level, float]] = {"tight": 0.80, "paused": 0.90, "preempting": 0.97}
"""The share of the elastic memory in use at which a level begins."""

LEAVE: Final[Mapping[Level, float]] = {"tight": 0.70, "paused": 0.80, "preempting": 0.90}
"""The share below which it ends. Preempting makes room down to here."""

MAX_FACTOR: Final = 3.05
"""How many times the KV memory that there is budgets may come to at most."""

STEP: Final = 1 / 64
"""Limits change by an engine's part of this share of the elastic memory at least, unless it is up against its limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What was seen of an engine."""

    #: KV memory that it holds; -1: it does not say. Then all that it may hold counts as its own, and none of it as pressure.
    used_bytes: int = -1
    #: Requests that run; -1 unknown.
    running: int = -1
    #: Of ``used_bytes``: what its interactive requests hold. -1 unknown: then it is asked to preempt one request at a time,
    #: and never its last.
    kept_bytes: int = -1
    #: Seconds to compute a byte of its KV memory again: which work is cheap to preempt.
    recompute_s_per_byte: float = 1e-9
    #: When the look at it began, by the caller's clock; infinity: just now.
    at_s: float = math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Use(Seen):
    """An engine that obeys limits, as it is now."""

    engine_id: str
    #: The limit that it last agreed to, and the largest that may still be in force.
    limit_bytes: int
    ceiling_bytes: int
    #: KV memory of one request of the longest length: no limit is below.
    floor_bytes: int
    #: What the scheduler may promise there.
    budget_bytes: int = 0
    #: It was limited to less than it held, and the pressure is not over.
    squeezed: bool = False

    @property
    def held_bytes(self) -> int:
        """What nobody else can have: what it uses, its floor at least."""
        used = self.ceiling_bytes if self.used_bytes < 0 else self.used_bytes
        return max(used, self.floor_bytes)

    @property
    def may_hold_bytes(self) -> int:
        """What it could hold before it hears of a new limit."""
        return max(self.held_bytes, self.ceiling_bytes)

    @property
    def pending_bytes(self) -> int:
        """What it still holds beyond its limit: on its way back."""
        return max(0, self.used_bytes - self.limit_bytes)

    @property
    def able_bytes(self) -> int:
        """What it could be asked to give up by preempting."""
        if self.used_bytes < 0 or self.pending_bytes:
            return 0
        if self.kept_bytes >= 0:
            return max(0, self.used_bytes - max(self.floor_bytes, self.kept_bytes))
        one_bytes = self.used_bytes // self.running if self.running > 1 else 0
        return max(0, min(one_bytes, self.used_bytes - self.floor_bytes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """A GPU's elastic engines."""

    #: KV memory that they share: what weights, servers and other engines leave.
    kv_bytes: int
    engines: Sequence[Use]
    level: Level = "normal"
    #: HBM that a model that is about to wake waits for.
    room_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is to be done."""

    level: Level
    pressure: float
    #: New limits by engine, of those that change.
    limits: Mapping[str, int]
    #: Engines that are, or stay, limited to less than they held.
    squeezed: tuple[str, ...] = ()

    @property
    def pause(self) -> bool:
        """Nothing new may be granted on this GPU."""
        return self.level in {"paused", "preempting"}


def guard(usage: Usage) -> Verdict:
    """The level, and new limits that never come to more than there is, even while some engines have not heard of theirs."""
    engines = usage.engines
    if not engines:
        return Verdict(level="normal", pressure=0.0, limits={})
    elastic_bytes = usage.kv_bytes - sum(e.floor_bytes for e in engines)
    used_bytes = sum(max(0, e.used_bytes - e.floor_bytes) for e in engines)
    pressure = used_bytes / elastic_bytes if elastic_bytes > 0 else float(used_bytes > 0)
    free_bytes = usage.kv_bytes - sum(e.held_bytes for e in engines)
    level = _level(usage.level, pressure)
    if all(e.running == 0 for e in engines) and level in {"paused", "preempting"}:
        level = "tight"  # what is held is cache: nothing runs whose end could be waited for
    pressed = level in {"paused", "preempting"}

    targets = {e.engine_id: max(e.limit_bytes, e.kept_bytes, e.floor_bytes) for e in engines if e.squeezed and pressed}
    if level == "preempting":
        lacking_bytes = math.ceil((pressure - LEAVE[level]) * max(0, elastic_bytes))
        targets |= _preempt(engines, lacking_bytes)
    squeezed = tuple(targets)

    step_bytes = max(1, int(elastic_bytes * STEP / len(engines)))
    # Room is made where use leaves it: engines without any would have to preempt for each next block.
    asked_bytes = usage.room_bytes if usage.room_bytes + step_bytes * len(engines) <= free_bytes else 0
    others = [e for e in engines if e.engine_id not in targets]
    weights = [step_bytes + (max(e.budget_bytes - e.held_bytes, e.held_bytes) if e.running else 0) for e in others]
    for e, share in zip(others, _shares(max(0, free_bytes - asked_bytes), weights), strict=True):
        targets[e.engine_id] = e.held_bytes + share

    # What is raised comes from what nobody may hold any more.
    left_bytes = max(0, usage.kv_bytes - asked_bytes - sum(e.may_hold_bytes for e in engines))
    raises = [max(0, targets[e.engine_id] - e.may_hold_bytes) for e in engines]
    given = raises if sum(raises) <= left_bytes else _shares(left_bytes, raises)
    limits: dict[str, int] = {}
    for e, more in zip(engines, given, strict=True):
        limit_bytes = min(targets[e.engine_id], e.may_hold_bytes + more)
        urgent = asked_bytes or e.engine_id in squeezed or e.held_bytes > e.limit_bytes - step_bytes
        if limit_bytes != e.limit_bytes and (urgent or abs(limit_bytes - e.limit_bytes) >= step_bytes):
            limits[e.engine_id] = limit_bytes
    return Verdict(level=level, pressure=pressure, limits=limits, squeezed=squeezed)


def _level(was: Level, pressure: float) -> Level:
    """Up at once, down where the pressure is below the level's own end."""
    reached = max((n for n, level in enumerate(LEVELS) if pressure >= ENTER.get(level, -math.inf)), default=0)
    n = LEVELS.index(was)
    while n > reached and pressure < LEAVE[LEVELS[n]]:
        n -= 1
    return LEVELS[max(n, reached)]


def _preempt(engines: Sequence[Use], lacking_bytes: int) -> dict[str, int]:
    """Limits below what they hold for those whose requests cost the fewest seconds to compute again, until enough comes back."""
    limits: dict[str, int] = {}
    lacking_bytes -= sum(e.pending_bytes for e in engines)
    able = [e for e in engines if e.able_bytes > 0]
    while lacking_bytes > 0 and able:
        cheapest = min(able, key=lambda e: (_cost_s(e, lacking_bytes), e.engine_id))
        taken_bytes = min(cheapest.able_bytes, lacking_bytes)
        limits[cheapest.engine_id] = cheapest.used_bytes - taken_bytes
        lacking_bytes -= taken_bytes
        able.remove(cheapest)
    return limits


def _cost_s(e: Use, lacking_bytes: int) -> float:
    """Seconds of recomputing for each byte that it would give: requests are preempted whole."""
    taken_bytes = min(e.able_bytes, lacking_bytes)
    one_bytes = max(1, e.used_bytes // max(1, e.running))
    lost_bytes = min(math.ceil(taken_bytes / one_bytes) * one_bytes, max(e.able_bytes, one_bytes))
    return lost_bytes * e.recompute_s_per_byte / taken_bytes


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """``total`` by weight, rounded down."""
    whole = sum(weights)
    return [total * w // whole if whole else 0 for w in weights]


@dataclass(slots=True, eq=False)
class _Entry:
    fixed_bytes: int
    floor_bytes: int
    elastic: Elastic
    #: KV memory that it has allocated (``accounted``), and that it was last wanted to have.
    kv_bytes: int
    wanted_bytes: int
    limit_bytes: int
    ceiling_bytes: int
    agreed_at_s: float = -math.inf
    #: The largest limit that it was told since, and that it may have heard of.
    told_bytes: int = 0
    use: Use | None = None
    squeezed: bool = False

    @property
    def kv_held_bytes(self) -> int:
        if self.elastic == "accounted":
            return self.kv_bytes
        return max(self.ceiling_bytes, self.floor_bytes, self.use.held_bytes if self.use else 0)


class KvLedger:
    """The HBM of one GPU: weights, servers and KV memory of the engines that are in it come to no more than ``usable_bytes``.

    An engine is in it from the first second of its start or wake (`enter`) until its sleep or end is over (`leave`).
    ``factor``: how many times the elastic engines' KV memory their budgets may come to.
    """

    def __init__(self, *, usable_bytes: int, factor: float = 1.0) -> None:
        if not 1.0 <= factor <= MAX_FACTOR:
            raise ValueError(f"KV budgets may be over-subscribed 1 to {MAX_FACTOR} times, got {factor}")
        self.usable_bytes = usable_bytes
        self.factor = factor
        self.level: Level = "normal"
        self._engines: dict[str, _Entry] = {}
        #: HBM that engines which did not fit have asked for since the last `guard`.
        self._waiting: dict[str, int] = {}

    @property
    def held_bytes(self) -> int:
        """Weights, servers, and all KV memory that engines hold or may hold."""
        return sum(e.fixed_bytes + e.kv_held_bytes for e in self._engines.values())

    @property
    def kv_bytes(self) -> int:
        """What the elastic engines have for KV memory together."""
        taken = sum(e.fixed_bytes + (e.kv_bytes if e.elastic == "accounted" else 0) for e in self._engines.values())
        return max(0, self.usable_bytes - taken)

    def enter(
        self, engine_id: str, *, fixed_bytes: int, floor_bytes: int, kv_bytes: int = 0, elastic: Elastic = "accounted"
    ) -> bool:
        """Count an engine from now on. False: there is no room now. Who asks again before each `guard` has some made.

        ``fixed_bytes``: weights and server. ``kv_bytes``: what an accounted engine allocates, what is wanted for an enforced one.
        An enforced engine begins with a limit of its floor: tell it (`limit_bytes`) before it serves.
        """
        if engine_id in self._engines:
            return True
        least_bytes = max(floor_bytes, kv_bytes) if elastic == "accounted" else floor_bytes
        if fixed_bytes + least_bytes > self.usable_bytes - self.held_bytes:
            self._waiting[engine_id] = fixed_bytes + least_bytes
            return False
        self._waiting.pop(engine_id, None)
        kv_bytes = max(floor_bytes, kv_bytes)
        self._engines[engine_id] = _Entry(
            fixed_bytes, floor_bytes, elastic, kv_bytes, kv_bytes, limit_bytes=floor_bytes, ceiling_bytes=floor_bytes
        )
        return True

    def leave(self, engine_id: str) -> None:
        """It is in HBM no more. Idempotent."""
        self._engines.pop(engine_id, None)

    def __contains__(self, engine_id: str) -> bool:
        return engine_id in self._engines

    def limit_bytes(self, engine_id: str) -> int:
        """The KV memory that an engine may hold: its limit, or what an accounted one allocated. 0: it is not here."""
        entry = self._engines.get(engine_id)
        return 0 if entry is None else entry.kv_bytes if entry.elastic == "accounted" else entry.limit_bytes

    def share_bytes(self, engine_id: str) -> int:
        """Of the KV memory that there is, what an engine was last wanted to have, its floor at least. 0: it is not here."""
        entry = self._engines.get(engine_id)
        return 0 if entry is None else max(entry.wanted_bytes, entry.floor_bytes)

    # -- what may be promised -----------------------------------------------------------------------------------------------
    def budgets(self, wanted: Mapping[str, int] | None = None) -> dict[str, int]:
        """What each engine that is here may promise, from what is wanted for it of the KV memory that there is.

        An elastic one may promise ``factor`` times its part; once it is tight, no more than that. Each may promise what it
        holds, and its floor. What is beyond is cut in proportion, so that all come to ``factor`` times what there is at most.
        Who wants more never gets less by it. An accounted engine's budget is what it has allocated, at most. 0, or not named: as
        it was last wanted.
        """
        for k, want_bytes in (wanted or {}).items():
            if k in self._engines:
                e = self._engines[k]
                most_bytes = e.kv_bytes if e.elastic == "accounted" else self.usable_bytes
                e.wanted_bytes = min(want_bytes, most_bytes) or e.wanted_bytes
        found: dict[str, int] = {}
        elastic = {k: e for k, e in self._engines.items() if e.elastic == "enforced"}
        for k, e in self._engines.items():
            if e.elastic == "accounted":
                found[k] = self.share_bytes(k)
        least = {k: max(e.floor_bytes, e.use.used_bytes if e.use else 0) for k, e in elastic.items()}
        floors_bytes = sum(e.floor_bytes for e in elastic.values())
        factor = self.factor if self.level == "normal" else 1.0
        gaps: list[int] = []
        for k, e in elastic.items():
            most_bytes = self.kv_bytes - floors_bytes + e.floor_bytes
            gaps.append(max(0, int(min(e.wanted_bytes, most_bytes) * factor) - least[k]))
        room_bytes = max(0, int(self.kv_bytes * factor) - sum(least.values()))
        given = gaps if sum(gaps) <= room_bytes else _shares(room_bytes, gaps)
        return found | {k: least[k] + more for k, more in zip(elastic, given, strict=True)}

    # -- what may be held ---------------------------------------------------------------------------------------------------
    def guard(self, seen: Mapping[str, Seen]) -> Verdict:
        """What is to be done, from what was seen. Tell the engines their new limits, and `confirm` each that took its own.

        An engine that is not named cannot be told now (it is on its way): it keeps its limit, and all that it may hold is its own.
        """
        for k, e in self._engines.items():
            look = seen.get(k)
            if look is not None and look.used_bytes >= 0 and look.at_s >= e.agreed_at_s:
                e.ceiling_bytes = max(e.limit_bytes, e.told_bytes)  # what it uses beyond that is seen
        uses = list(self._uses(seen, self.budgets()))
        room_bytes = min(self._waiting.values(), default=0)  # who waits for more comes after
        self._waiting.clear()
        unseen = (e for k, e in self._engines.items() if e.elastic == "enforced" and k not in seen)
        kv_bytes = max(0, self.kv_bytes - sum(e.kv_held_bytes for e in unseen))
        verdict = guard(Usage(kv_bytes=kv_bytes, engines=uses, level=self.level, room_bytes=room_bytes))
        self.level = verdict.level
        for use in uses:
            entry = self._engines[use.engine_id]
            entry.use = use
            entry.squeezed = use.engine_id in verdict.squeezed
            entry.told_bytes = max(entry.told_bytes, verdict.limits.get(use.engine_id, 0))
            entry.ceiling_bytes = max(entry.ceiling_bytes, entry.told_bytes)
        return verdict

    def confirm(self, engine_id: str, limit_bytes: int, *, at_s: float = -math.inf) -> None:
        """An engine obeys a limit since ``at_s``. What it could hold before counts as its own until a look that began later."""
        entry = self._engines.get(engine_id)
        if entry is not None and entry.elastic == "enforced":
            entry.limit_bytes, entry.told_bytes = limit_bytes, 0
            entry.ceiling_bytes = max(entry.ceiling_bytes, limit_bytes)
            entry.agreed_at_s = at_s

    def _uses(self, seen: Mapping[str, Seen], budgets: Mapping[str, int]) -> Iterable[Use]:
        for k, e in self._engines.items():
            if e.elastic == "enforced" and (s := seen.get(k)) is not None:
                yield Use(
                    engine_id=k,
                    limit_bytes=e.limit_bytes,
                    ceiling_bytes=e.ceiling_bytes,
                    floor_bytes=e.floor_bytes,
                    budget_bytes=budgets[k],
                    squeezed=e.squeezed,
                    **dataclasses.asdict(s),
                )
