"""GPUs that several models share: which are awake where, what is moving between tiers, and what a placement is told of it.

Of every GPU all models that fit one of it may run there; an engine exists while its model is awake. HBM is shared by weights,
servers and KV memory of those that are in it (a model that wakes takes its part at once); the engines take turns on the GPU,
so that each step of one takes as many times its seconds as engines serve there. Host memory holds the weights of sleeping models
as far as it goes. What a sleeping server keeps of HBM is left out, and so are models on several GPUs (tensor parallelism):
they stay where they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from maestro_agents.errors import ConfigError
from maestro_agents.nodes import Tier
from maestro_agents.policy.demand import ASK_S, Demands, Use
from maestro_agents.policy.placement import Action, Board, GpuState, Place, Resident, Sleep, Wake
from maestro_agents.simulator.hardware import Served, SimEngine, SimFleet, SimNode
from maestro_agents.simulator.hardware import gpus as gpu_kinds
from maestro_agents.simulator.workload import Run, Stage, Workload
from maestro_agents.tenants import with_residency
from maestro_agents.workflow import Follows


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What the world does for its GPUs. Engines are told by their number."""

    later: Callable[[float, Callable[[Any], None], Any], None]
    tell: Callable[[tuple[Any, ...]], None]
    #: Let it take stages; let it take no more.
    start: Callable[[int], None]
    stop: Callable[[int], None]
    #: Number, KV bytes that it has, KV bytes that it may promise.
    resize: Callable[[int, int, int], None]
    slow: Callable[[int, float], None]
    #: The smallest moment among the waiting stages of a model.
    due_at_s: Callable[[str], float]


@dataclass(slots=True, eq=False)
class _Slot:
    """A model on a GPU."""

    number: int
    gpu: _Gpu
    served: Served
    sim: SimEngine
    floor_bytes: int
    tier: Tier = "disk"
    to: Tier = "disk"
    changed_at_s: float = -math.inf
    kv_bytes: int = 0
    wanted_bytes: int = 0
    #: What its engine was told: KV bytes that it has, and may promise; how much slower it is than alone.
    told: tuple[int, int] = (0, 0)
    slower: float = 1.0
    use: Use = field(default_factory=Use)
    #: Predicted ends of what it runs.
    ends_s: dict[str, float] = field(default_factory=dict[str, float])
    #: As a placement was last told of it; that stays true while it is.told_of.
    told_of: Resident | None = None
    #: Moves that were under way when its node died count no more.
    life: int = 0

    @property
    def awake(self) -> bool:
        return self.tier == "gpu" == self.to

    @property
    def hbm_bytes(self) -> int:
        return self.served.weight_bytes + self.served.server_bytes


@dataclass(slots=True, eq=False)
class _Gpu:
    gpu_id: str
    usable_bytes: int
    node: _Node
    slots: dict[str, _Slot] = field(default_factory=dict[str, _Slot])
    promised: str = ""
    serving: int = 0
    alive: bool = True

    @property
    def free_bytes(self) -> int:
        return self.usable_bytes - sum(s.hbm_bytes + s.kv_bytes for s in self.slots.values() if "gpu" in {s.tier, s.to})


@dataclass(slots=True, eq=False)
class _Node:
    sim: SimNode
    ram_free_bytes: int


class Gpus:
    """The GPUs of a fleet. ``engines``: one for every model and GPU that it fits, by number; `begin` starts some of them."""

    def __init__(self, fleet: SimFleet, workload: Workload, place: Place) -> None:
        self._place = place
        self._hooks: Hooks
        self._asked_at_s = -math.inf
        self._pending = False
        self._demands = Demands()
        self._follows = Follows()
        self._gpus: dict[str, _Gpu] = {}
        self._slots: list[_Slot] = []
        nodes = {n.node_id: _Node(n, n.host_ram_bytes) for n in fleet.nodes.values()}
        longest = _longest(workload)
        fixed = {g for e in fleet.engines if len(e.gpus) != 1 for g in e.gpus}
        for sim_gpu in fleet.gpus.values():
            if sim_gpu.gpu_id in fixed:
                continue
            gpu = _Gpu(sim_gpu.gpu_id, sim_gpu.usable_bytes, nodes[sim_gpu.node_id])
            self._gpus[gpu.gpu_id] = gpu
            kind = gpu_kinds()[sim_gpu.kind]
            rtt_s = fleet.clusters[sim_gpu.cluster].rtt_s
            for model in fleet.models.values():
                if not model.may_run(sim_gpu.cluster):
                    continue
                try:
                    served = model.on(kind)
                except ConfigError:
                    continue
                if served.tensor_parallel != 1:
                    continue
                length = min(served.profile.max_model_len, longest.get(model.name, served.profile.max_model_len))
                profile = dataclasses.replace(served.profile, max_model_len=length)
                spec = served.spec(f"{model.name}.{gpu.gpu_id}", model=model.name, cluster=sim_gpu.cluster, rtt_s=rtt_s)
                spec = with_residency(dataclasses.replace(spec, max_model_len=length), fleet.tenants)
                sim = SimEngine(spec=spec, profile=profile, gpus=(gpu.gpu_id,), served=served)
                block_bytes = profile.block_size * spec.kv_bytes_per_token
                floor_bytes = -(-length // profile.block_size) * block_bytes
                slot = _Slot(len(self._slots), gpu, served, sim, floor_bytes)
                gpu.slots[model.name] = slot
                self._slots.append(slot)
        self._start = [self._gpus[e.gpus[0]].slots[e.spec.model] for e in fleet.engines if len(e.gpus) == 1]
        self.engines = [s.sim for s in self._slots]

    @staticmethod
    def shared(fleet: SimFleet) -> bool:
        """Whether models share GPUs: one runs nowhere at the start, or several run on one GPU then."""
        taken = [e.gpus[0] for e in fleet.engines if len(e.gpus) == 1]
        return bool(fleet.models.keys() - {e.spec.model for e in fleet.engines}) or len(set(taken)) < len(taken)

    def begin(self, hooks: Hooks) -> None:
        """Have the fleet's engines awake from the start, with equal parts of the KV memory."""
        self._hooks = hooks
        for slot in self._start:
            slot.tier = slot.to = "gpu"
        for slot in self._start:
            others = sum(s.to == "gpu" for s in slot.gpu.slots.values())
            used = sum(s.hbm_bytes for s in slot.gpu.slots.values() if s.to == "gpu")
            slot.wanted_bytes = max(slot.floor_bytes, (slot.gpu.usable_bytes - used) // others)
        for slot in self._start:
            slot.kv_bytes = slot.floor_bytes
            if slot.gpu.free_bytes < 0:
                raise ConfigError(
                    f"{slot.gpu.gpu_id}: {', '.join(slot.gpu.slots)} leave no KV memory for one request of the longest "
                    "length each: fewer models to a GPU at the start, or larger GPUs"
                )
        for slot in self._start:
            self._settle(slot.gpu)
            self._hooks.start(slot.number)

    # -- what the world tells ------------------------------------------------------------------------------------------
    def waits(self, stage_id: str, model: str, service_s: float, lost_at_s: float, now_s: float) -> None:
        """A stage of so many predicted seconds waits for a model; from ``lost_at_s`` on its run cannot meet its deadline."""
        self._demands.waits(stage_id, model, now_s, lost_at_s)
        self._demands.comes(model, service_s, now_s)
        self.want(now_s)

    def leaves(self, stage_id: str, model: str) -> None:
        """It waits no more."""
        self._demands.leaves(stage_id, model)

    def serves(self, number: int, stage_id: str, ends_at_s: float) -> None:
        """An engine got a stage."""
        self._slots[number].ends_s[stage_id] = ends_at_s

    def load(self, number: int, running: int, reserved_bytes: int, now_s: float) -> None:
        """What is reserved on an engine has changed."""
        slot = self._slots[number]
        was = slot.use.running
        slot.use.becomes(running, reserved_bytes, now_s)
        if (was > 0) != (running > 0):
            slot.gpu.serving += 1 if running else -1
            for other in slot.gpu.slots.values():
                if other.use.running and other.slower != slot.gpu.serving:
                    other.slower = float(slot.gpu.serving)
                    self._hooks.slow(other.number, other.slower)

    def ended(self, run: Run, n: int, number: int, now_s: float) -> None:
        """A stage of a run has ended, on the engine with this number (-1: on one that stays where it is)."""
        stage = run.stages[n]
        self._follows.ended(run.app, stage.role, stage.visit)
        self.expect(run, n, now_s)
        if number >= 0:
            slot = self._slots[number]
            slot.ends_s.pop(f"{run.run_id}.{n}", None)
            if slot.to != "gpu" == slot.tier and not slot.use.running:
                self._fall_asleep(slot, now_s)
            elif slot.kv_bytes > slot.wanted_bytes:
                self._settle(slot.gpu)
        self.want(now_s)

    def expect(self, run: Run, n: int, ends_at_s: float) -> None:
        """After this stage, which ends then, its run is expected to call what was seen to follow such a stage."""
        stage = run.stages[n]
        after = self._follows.after(run.app, stage.role, stage.visit)
        self._demands.expect(f"{run.run_id}.{n}", after, ends_at_s)

    def followed(self, run: Run, before: int, stage: Stage) -> None:
        """The end of a stage has led to another one, which is ready now."""
        led = run.stages[before]
        self._follows.followed(run.app, led.role, led.visit, stage.model, stage.gap_s)
        self._demands.followed(f"{run.run_id}.{before}")

    def run_ended(self, run: Run) -> None:
        """Nothing follows any more."""
        for n in range(len(run.stages)):
            self._demands.followed(f"{run.run_id}.{n}")

    def want(self, now_s: float) -> None:
        """Ask the placement, not too soon after the last time."""
        if not self._pending:
            self._pending = True
            at_s = max(now_s, self._asked_at_s + ASK_S)
            self._hooks.later(at_s, self._ask, at_s)

    # -- the placement -------------------------------------------------------------------------------------------------
    def board(self, now_s: float) -> Board:
        """What a placement is told."""
        gpus = [
            GpuState(
                gpu_id=gpu.gpu_id,
                usable_bytes=gpu.usable_bytes,
                residents=[self._resident(s, now_s) for s in gpu.slots.values()],
                ram_free_bytes=gpu.node.ram_free_bytes,
                promised=gpu.promised,
            )
            for gpu in self._gpus.values()
            if gpu.alive
        ]
        return Board(gpus=gpus, demands=self._demands.of(now_s, self._hooks.due_at_s))

    def _resident(self, s: _Slot, now_s: float) -> Resident:
        asleep = s.tier == s.to != "gpu"
        told = s.told_of
        if asleep and told is not None and (told.tier, told.to, told.changed_at_s) == (s.tier, s.to, s.changed_at_s):
            return told
        tiers = s.served.tiers
        if not asleep:
            s.use.fade(now_s)
        s.told_of = Resident(
            model=s.sim.spec.model,
            tier=s.tier,
            to=s.to,
            hbm_bytes=s.hbm_bytes,
            ram_bytes=s.served.weight_bytes,
            kv_floor_bytes=s.floor_bytes,
            kv_bytes=s.kv_bytes,
            reserved_bytes=s.use.reserved_bytes,
            usual_bytes=s.use.usual_bytes,
            running=s.use.running,
            busy=0.0 if asleep else s.use.busy,
            used_at_s=s.use.used_at_s,
            changed_at_s=s.changed_at_s,
            drain_s=max((e - now_s for e in s.ends_s.values()), default=0.0) if s.use.running else 0.0,
            wake_s=self._wake_s(s),
            sleep_s=(tiers.to_sleeping_s, tiers.from_sleeping_s),
            drop_s=(tiers.discard_s, tiers.reload_s),
        )
        return s.told_of

    @staticmethod
    def _wake_s(s: _Slot) -> float:
        tiers = s.served.tiers
        seconds: Mapping[Tier, float] = {
            "gpu": 0.0, "sleeping": tiers.from_sleeping_s, "dropped": tiers.reload_s, "disk": tiers.from_disk_s,
        }  # fmt: skip
        return seconds[s.tier]

    def _ask(self, now_s: float) -> None:
        self._pending = False
        self._asked_at_s = now_s
        for gpu in self._gpus.values():
            if any(s.kv_bytes != s.wanted_bytes for s in gpu.slots.values()):
                self._settle(gpu)
        for action in self._place(self.board(now_s), now_s):
            self._do(action, now_s)
        if self._demands.wanted or any(g.promised for g in self._gpus.values()):
            self.want(now_s)

    def _do(self, action: Action, now_s: float) -> None:
        gpu = self._gpus[action.gpu_id]
        slot = gpu.slots[action.model]
        if isinstance(action, Wake):
            self._bring(slot, now_s)
        elif isinstance(action, Sleep):
            gpu.promised = action.promised or gpu.promised
            if slot.awake:
                slot.to = action.to
                slot.wanted_bytes = slot.floor_bytes
                self._hooks.stop(slot.number)
                if not slot.use.running:
                    self._fall_asleep(slot, now_s)
        elif slot.to == "gpu":
            slot.wanted_bytes = max(slot.floor_bytes, action.kv_bytes)
            self._settle(gpu)

    def _bring(self, slot: _Slot, now_s: float) -> None:
        gpu = slot.gpu
        if "gpu" in {slot.tier, slot.to} or slot.tier != slot.to:
            return
        if slot.hbm_bytes + slot.floor_bytes > gpu.free_bytes:
            gpu.promised = slot.sim.spec.model
            return
        if gpu.promised == slot.sim.spec.model:
            gpu.promised = ""
        ready_at_s = now_s + self._wake_s(slot)
        slot.to = "gpu"
        slot.kv_bytes = slot.floor_bytes
        slot.wanted_bytes = gpu.free_bytes + slot.floor_bytes
        self._tell(slot, ready_at_s, now_s)
        self._hooks.later(ready_at_s, self._moved, (slot, slot.life, ready_at_s))

    def _fall_asleep(self, slot: _Slot, now_s: float) -> None:
        """Nothing runs there any more: its KV memory is free at once, that of its weights once they have left."""
        tiers = slot.served.tiers
        if slot.to == "sleeping":
            if slot.served.weight_bytes <= slot.gpu.node.ram_free_bytes:
                slot.gpu.node.ram_free_bytes -= slot.served.weight_bytes
            else:
                slot.to = "dropped"
        slot.kv_bytes = slot.wanted_bytes = 0
        ready_at_s = now_s + (tiers.to_sleeping_s if slot.to == "sleeping" else tiers.discard_s)
        self._tell(slot, ready_at_s, now_s)
        self._hooks.later(ready_at_s, self._moved, (slot, slot.life, ready_at_s))

    def _tell(self, slot: _Slot, ready_at_s: float, now_s: float) -> None:
        self._hooks.tell(("tier", now_s, slot.gpu.gpu_id, slot.sim.spec.model, slot.tier, slot.to, ready_at_s))

    def _moved(self, what: tuple[_Slot, int, float]) -> None:
        """A model has come to its new tier."""
        slot, life, now_s = what
        if life != slot.life:
            return
        was, slot.tier = slot.tier, slot.to
        slot.changed_at_s = now_s
        if was == "sleeping":
            slot.gpu.node.ram_free_bytes += slot.served.weight_bytes
        if slot.tier == "gpu":
            slot.told = (0, 0)
            self._settle(slot.gpu)
            self._hooks.start(slot.number)
        self.want(now_s)

    def _settle(self, gpu: _Gpu) -> None:
        """Bring KV memory to what the placement wants, as far as it is not reserved or not free yet."""
        here = [s for s in gpu.slots.values() if s.kv_bytes]
        for s in here:
            s.kv_bytes = min(s.kv_bytes, max(s.wanted_bytes, s.floor_bytes, s.use.reserved_bytes))
        for s in here:
            if not gpu.promised and s.kv_bytes < s.wanted_bytes:
                s.kv_bytes += max(0, min(s.wanted_bytes - s.kv_bytes, gpu.free_bytes))
            told = (s.kv_bytes, min(s.kv_bytes, s.wanted_bytes))
            if s.tier == "gpu" and told != s.told:
                s.told = told
                self._hooks.resize(s.number, *told)

    # -- faults --------------------------------------------------------------------------------------------------------
    def die(self, cluster: str) -> None:
        """The servers of a cluster are gone; its weights are on disk."""
        for slot in self._slots:
            if slot.sim.spec.cluster == cluster:
                slot.life += 1
                slot.tier = slot.to = "disk"
                slot.kv_bytes = slot.wanted_bytes = slot.use.running = slot.use.reserved_bytes = 0
                slot.use.busy = slot.use.usual_bytes = 0.0
                slot.ends_s = {}
                slot.gpu.alive, slot.gpu.serving, slot.gpu.promised = False, 0, ""
                slot.gpu.node.ram_free_bytes = slot.gpu.node.sim.host_ram_bytes

    def revive(self, cluster: str, now_s: float) -> None:
        """Its GPUs are there again, nothing on them."""
        for gpu in self._gpus.values():
            if gpu.node.sim.cluster == cluster:
                gpu.alive = True
        self.want(now_s)


def _longest(workload: Workload) -> dict[str, int]:
    """What an owner would set as the longest prompt and answer of each model: the power of two above its longest stage."""
    longest: defaultdict[str, int] = defaultdict(int)
    for run in workload.runs:
        for s in run.stages:
            longest[s.model] = max(longest[s.model], s.prompt_tokens + s.output_tokens)
    return {model: 1 << (tokens - 1).bit_length() for model, tokens in longest.items()}
