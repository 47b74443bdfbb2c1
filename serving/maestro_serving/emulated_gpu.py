"""A GPU that several emulated engines share, in one process: its memory, its turns, the seconds that weights take.

Memory: weights and servers of the engines on it (those that come count from the first second, those that leave until the
last), and KV pages. Pages are mapped as kvcached maps them: an engine has those that its requests use, some in reserve, and
those that hold prefixes; its limit (`EmulatedGpu.limit`) may let it have more than there is, and several limits together may
exceed the memory. An engine that asks where no page is left first forgets its own prefixes, then gets what others do not use,
then preempts its own lowest-priority request. Each engine on the GPU has the pages of one request of the longest length for
itself, so that none ever stands still.

The law: what is mapped never exceeds the memory. What would is refused (`EmulatedGpu.refused`); that it holds all the same
is looked at after every change (`EmulatedGpu.violations`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import uvicorn
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from maestro_agents.errors import ConfigError
from maestro_agents.nodes import Tier
from maestro_agents.simulator.engine import Engine
from maestro_agents.simulator.hardware import SLOTS, Gpu, Served, gpus, models, serve
from maestro_serving.admin import KV_CACHE, WEIGHTS, OutOfMemoryError
from maestro_serving.emulator import EmulatedModel, EmulatedServer, EmulatorConfig, listen, server_of, url_of
from maestro_serving.live import LiveEngine, Metrics

log = logging.getLogger("maestro.emulator")

RESERVE_BLOCKS: Final = 32
"""KV blocks that an engine gets beyond those it asks for, and keeps when its requests end."""

Source = Literal["host", "disk", "remote"]

Passes = Callable[[float], Awaitable[object]]
"""Lets seconds pass."""


@dataclass(kw_only=True, slots=True, eq=False)
class Part:
    """What one engine has of the GPU's memory."""

    name: str
    #: Weights and server.
    fixed_bytes: int
    block_bytes: int
    #: Its longest request's, and the most that it may have.
    floor_blocks: int
    limit_blocks: int
    #: Its weights and server are there, or on their way.
    here: bool = False
    #: Pages kept for an engine that does not run yet.
    promised_blocks: int = 0
    engine: Engine | None = None
    #: How many engines take turns, as it was told.
    turns: int = 1

    @property
    def blocks(self) -> int:
        return self.engine.num_blocks if self.engine else self.promised_blocks

    @property
    def kv_bytes(self) -> int:
        """Mapped for its KV."""
        return self.blocks * self.block_bytes

    @property
    def used_bytes(self) -> int:
        """Of that, what its requests use."""
        return self.engine.used_blocks * self.block_bytes if self.engine else 0

    @property
    def hbm_bytes(self) -> int:
        """In all."""
        return self.fixed_bytes * self.here + self.kv_bytes


class EmulatedGpu:
    """The memory and the turns of one GPU. No I/O; ``clock`` says what time it is."""

    def __init__(self, usable_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.usable_bytes = usable_bytes
        self.parts: dict[str, Part] = {}
        #: Moves that found no room; and how often more was mapped than there is, which is never.
        self.refused = 0
        self.violations = 0
        #: The most that was ever mapped.
        self.peak_bytes = 0
        self._clock = clock
        #: Engines in the middle of a call for pages.
        self._asking: set[str] = set()
        self._settling = False

    @property
    def mapped_bytes(self) -> int:
        return sum(part.hbm_bytes for part in self.parts.values())

    @property
    def free_bytes(self) -> int:
        return self.usable_bytes - self.mapped_bytes

    def bring(self, part: Part, *, weights: bool, kv: bool) -> None:
        """Have weights and server, KV memory, or both on the GPU. Raises `OutOfMemoryError`: nothing has changed then."""
        needed = part.fixed_bytes * (weights and not part.here)
        missing = part.floor_blocks - part.blocks if kv else 0
        needed += max(0, missing) * part.block_bytes
        self._reclaim(needed - self.free_bytes, part)
        if needed > self.free_bytes:
            self.refused += 1
            raise OutOfMemoryError(
                f"CUDA out of memory (emulated): {part.name} needs {needed / 1e9:.2f} GB, "
                f"{self.free_bytes / 1e9:.2f} of {self.usable_bytes / 1e9:.2f} GB are free"
            )
        self.parts[part.name] = part
        part.here = part.here or weights
        if missing > 0 and part.engine:
            part.engine.resize(part.floor_blocks, self._clock())
        elif missing > 0:
            part.promised_blocks = part.floor_blocks
        self.settle()

    def run(self, part: Part, engine: Engine) -> None:
        """Its engine runs, with the pages that were kept for it (`more` must be where that engine asks for others)."""
        part.engine, part.promised_blocks = engine, 0
        self.settle()

    def leave(self, part: Part, *, weights: bool, kv: bool) -> None:
        """Weights and server, KV memory, or both are gone. Of an engine whose KV leaves, nothing runs."""
        if kv and part.engine:
            part.engine.give_back(part.engine.num_blocks, self._clock())
        part.promised_blocks *= not kv
        part.here = part.here and not weights
        self.settle()

    def end(self, part: Part) -> None:
        """Its process is gone, and all that it had."""
        if self.parts.get(part.name) is part:
            del self.parts[part.name]
        part.here, part.engine, part.promised_blocks = False, None, 0
        self.settle()

    def limit(self, part: Part, kv_bytes: int) -> None:
        """Let it have so much KV memory (kvcached's limit), one longest request's at least. What runs beyond it may end."""
        part.limit_blocks = max(part.floor_blocks, kv_bytes // part.block_bytes)
        self.settle()

    def more(self, part: Part, wished: int, needed: int) -> int:
        """`maestro_agents.simulator.engine.MoreBlocks` of an engine."""
        room = part.limit_blocks - part.blocks
        if room <= 0:
            return 0
        self._asking.add(part.name)
        try:
            self._reclaim(min(needed, room) * part.block_bytes - self.free_bytes, part)
        finally:
            self._asking.discard(part.name)
        given = max(0, min(room, max(wished, needed) + RESERVE_BLOCKS, self.free_bytes // part.block_bytes))
        self._check(given * part.block_bytes)
        return given

    def settle(self) -> None:
        """Something has changed: unused pages go back, who waits for some asks again, and turns are taken anew."""
        if self._settling:
            return
        self._settling = True
        self._check()
        try:
            freed = sum(self._trim(part) for part in self.parts.values())
            engines = [(part, part.engine) for part in self.parts.values() if part.engine]
            now_s = self._clock()
            for _, engine in engines:
                if freed and engine.num_waiting:
                    engine.look_again(now_s)
            turns = max(1, sum(engine.num_running > 0 for _, engine in engines))
            for part, engine in engines:
                if part.turns != turns:
                    part.turns = turns
                    engine.slow(float(turns), now_s)
        finally:
            self._settling = False

    def _trim(self, part: Part) -> int:
        engine = part.engine
        if engine is None or not engine.num_blocks:
            return 0
        spare = min(engine.free_blocks - engine.kept_blocks - RESERVE_BLOCKS, engine.num_blocks - part.floor_blocks)
        beyond = min(engine.free_blocks, engine.num_blocks - part.limit_blocks)
        given = max(spare, beyond)
        return engine.give_back(given, self._clock()) if given > 0 else 0

    def _reclaim(self, missing_bytes: int, asks: Part) -> None:
        """Take what other engines do not use: reserves and prefixes, from who has most of them first."""
        if missing_bytes <= 0:
            return

        def unused(part: Part) -> int:
            engine = part.engine
            if engine is None or part is asks or part.name in self._asking:
                return 0
            return max(0, min(engine.free_blocks, engine.num_blocks - part.floor_blocks))

        self._asking.add(asks.name)
        try:
            for part in sorted(self.parts.values(), key=lambda p: -unused(p) * p.block_bytes):
                if missing_bytes <= 0:
                    break
                blocks = min(unused(part), -(-missing_bytes // part.block_bytes))
                if blocks and part.engine:
                    missing_bytes -= part.engine.give_back(blocks, self._clock()) * part.block_bytes
        finally:
            self._asking.discard(asks.name)

    def _check(self, coming_bytes: int = 0) -> None:
        """Count what is mapped anew, by what the engines themselves use."""
        mapped = coming_bytes
        for part in self.parts.values():
            used = max(part.engine.num_blocks, part.engine.used_blocks) if part.engine else part.promised_blocks
            mapped += part.fixed_bytes * part.here + used * part.block_bytes
        self.peak_bytes = max(self.peak_bytes, mapped)
        if mapped > self.usable_bytes:
            self.violations += 1
            log.error("%d bytes are mapped of %d: the emulated GPU is broken", mapped, self.usable_bytes)


# -- engines on it -----------------------------------------------------------------------------------------------------
class EngineOnGpu(BaseModel):
    """One engine as the process is told of it. ``profile``: a model of ``simulator/profiles/models.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: str
    #: As clients call it; "": by its name.
    model: str = ""
    #: 0: any free one, the same for the engine's whole life.
    port: NonNegativeInt = 0
    slots: NonNegativeInt = 0
    max_model_len: NonNegativeInt = 0
    max_num_queued_reqs: NonNegativeInt = 0
    #: 0: as much as the GPU has beside this engine's weights.
    kv_bytes: NonNegativeInt = 0
    speed: PositiveFloat = 1.0


class _Life:
    """One server of an engine, from its start to its end: what of it moves between the GPU and elsewhere."""

    def __init__(self, engine: _Resident, part: Part) -> None:
        self.part = part
        self.server: EmulatedServer | None = None
        self.live: LiveEngine | None = None
        self.serving: asyncio.Task[None] | None = None
        self.uvicorn: uvicorn.Server | None = None
        #: While it moves.
        self.to: Tier | None = "gpu"
        self._engine = engine
        self._level = 0

    @property
    def tier(self) -> Tier:
        if self.server is None or WEIGHTS not in self.server.admin.asleep:
            return "gpu"
        return "sleeping" if self._level == 1 else "dropped"

    # `maestro_serving.admin.Memory`
    async def discard(self, level: int) -> None:
        tiers = self._engine.served.tiers
        self._level = level
        self._engine.gpu.leave(self.part, weights=False, kv=True)
        async with self._moving("sleeping" if level == 1 else "dropped"):
            await self._engine.passes(tiers.to_sleeping_s if level == 1 else tiers.discard_s)
            self._engine.gpu.leave(self.part, weights=True, kv=False)

    async def bring(self, tags: frozenset[str]) -> None:
        self._engine.gpu.bring(self.part, weights=WEIGHTS in tags, kv=KV_CACHE in tags)
        if WEIGHTS in tags and self._level == 1:
            async with self._moving("gpu"):
                await self._engine.passes(self._engine.served.tiers.from_sleeping_s)

    async def reload(self) -> None:
        async with self._moving("gpu"):
            await self._engine.passes(self._engine.served.tiers.reload_s)

    @contextlib.asynccontextmanager
    async def _moving(self, to: Tier) -> AsyncGenerator[None]:
        self.to = to
        try:
            yield
        finally:
            self.to = None


class _Resident:
    """A model that the GPU may hold, whether its server runs or not."""

    def __init__(
        self, name: str, about: EngineOnGpu, gpu: EmulatedGpu, kind: Gpu, *, host: str, passes: Passes
    ) -> None:
        if about.profile not in models():
            raise ConfigError(f"unknown profile {about.profile!r}: known are {', '.join(models())}")
        self.name = name
        self.about = about
        self.gpu = gpu
        self.served: Served = serve(models()[about.profile], kind, tensor_parallel=1, slots=about.slots or SLOTS)
        #: Where the files of its weights are: in the page cache, once a server has read them.
        self.files: Source = "disk"
        self.life: _Life | None = None
        self._host = host
        self._passes = passes
        self._moving = asyncio.Lock()
        with listen(host, about.port) as listener:  # only to learn of a port
            self.port = int(listener.getsockname()[1])
            self.url = url_of(listener)
        profile = self.served.profile
        tokens = min(about.max_model_len or profile.max_model_len, profile.max_model_len)
        self.block_bytes = self.served.kv_bytes // profile.num_blocks
        self.profile = dataclasses.replace(
            profile,
            num_blocks=-(-tokens // profile.block_size),
            max_model_len=tokens,
            max_queued=about.max_num_queued_reqs or None,
        ).faster(about.speed)
        self.limit_bytes = about.kv_bytes or self.served.kv_bytes

    async def passes(self, seconds: float) -> None:
        """Let the time of a move pass."""
        await self._passes(seconds / self.about.speed)

    async def start(self, source: Source | None = None, *, at_once: bool = False) -> None:
        """Have its server up: from the weights' files where they are now, or are said to be. Raises `OutOfMemoryError`."""
        async with self._moving:
            if self.life:
                return
            floor = self.profile.num_blocks
            part = Part(
                name=self.name,
                fixed_bytes=self.served.weight_bytes + self.served.server_bytes,
                block_bytes=self.block_bytes,
                floor_blocks=floor,
                limit_blocks=max(floor, self.limit_bytes // self.block_bytes),
            )
            self.gpu.bring(part, weights=True, kv=True)
            life = self.life = _Life(self, part)
            try:
                tiers = self.served.tiers
                seconds = {"host": tiers.from_host_s, "disk": tiers.from_disk_s, "remote": tiers.from_remote_s}
                if not at_once:
                    await self.passes(seconds[source or self.files])
                self.files = "host"
                await self._serve(life)
            except BaseException:
                self.life = None
                self.gpu.end(part)
                raise
            life.to = None

    async def _serve(self, life: _Life) -> None:
        def build(model: EmulatedModel, index: int, metrics: Metrics) -> LiveEngine:
            life.live = LiveEngine(
                model.name,
                model.profile,
                index=index,
                metrics=metrics,
                kv_blocks=life.part.limit_blocks,
                more=lambda wished, needed: self.gpu.more(life.part, wished, needed),
                changed=self.gpu.settle,
            )
            return life.live

        model = EmulatedModel(name=self.about.model or self.name, profile=self.profile)
        config = EmulatorConfig(models=(model,), dev_mode=True)
        life.server = EmulatedServer(config, build=build, memory=life)
        if life.live is None:
            raise AssertionError("an emulated server builds its engine")
        self.gpu.run(life.part, life.live.model)
        listener = listen(self._host, self.port)
        ready = asyncio.Event()
        life.uvicorn = server_of(life.server.app, ready.set, signals=False)
        life.serving = asyncio.create_task(life.uvicorn.serve(sockets=[listener]), name=f"server {self.name}")
        await ready.wait()

    async def stop(self) -> None:
        """End its server: connections break, and all that it had of the GPU is free. Idempotent."""
        async with self._moving:
            life, self.life = self.life, None
            if life is None:
                return
            self.gpu.end(life.part)
            if life.live:
                life.live.abort(None, answered=False)
            if life.uvicorn and life.serving:
                life.uvicorn.should_exit = life.uvicorn.force_exit = True
                await life.serving

    def limit_kv(self, kv_bytes: int) -> None:
        """Let it have so much KV memory, now and after later starts."""
        self.limit_bytes = kv_bytes
        if self.life:
            self.gpu.limit(self.life.part, kv_bytes)
            if self.life.live:
                self.life.live.kv_blocks = self.life.part.limit_blocks

    def state(self) -> dict[str, Any]:
        life = self.life
        live = life.live if life else None
        admin = life.server.admin if life and life.server else None
        running, waiting = live.shown if live else (-1, -1)
        tier: Tier = life.tier if life and live else self.files
        return {
            "name": self.name,
            "model": self.about.model or self.name,
            "profile": self.about.profile,
            "url": self.url if live else "",
            "tier": tier,
            "to": (life and life.to) or tier,
            "sleep_level": admin.level if admin else None,
            "paused": bool(admin and admin.paused),
            "garbled": bool(live and live.garbled),
            "weight_bytes": self.served.weight_bytes,
            "server_bytes": self.served.server_bytes,
            "kv_floor_bytes": self.profile.num_blocks * self.block_bytes,
            "kv_limit_bytes": life.part.limit_blocks * self.block_bytes if life else self.limit_bytes,
            "kv_bytes": life.part.kv_bytes if life else 0,
            "kv_used_bytes": life.part.used_bytes if life else 0,
            "hbm_bytes": life.part.hbm_bytes if life else 0,
            "host_bytes": self.served.weight_bytes if tier == "sleeping" else 0,
            "turns": life.part.turns if life else 1,
            "running": running,
            "waiting": waiting,
            "preemptions": live.model.preemptions if live else -1,
            "prefix_queries": live.prefix_queries if live else 0,
            "prefix_hits": live.prefix_hits if live else 0,
        }


# -- the process -------------------------------------------------------------------------------------------------------
class GpuProcess:
    """Several emulated servers on one emulated GPU, and what starts and stops them (`app`, on a port of its own).

    GET ``/state``; PUT ``/engines/NAME`` with an `EngineOnGpu`; POST ``/engines/NAME/start`` (``{"from": "disk"}``: where its
    weights' files are), ``/engines/NAME/stop``, ``/engines/NAME/limit_kv`` (``{"kv_bytes": 2000000000}``). Each is answered when
    it is done, a start without room with 409. Sleep and wake are vLLM's own endpoints, at the engine's own port.
    """

    def __init__(
        self, kind: str, *, hbm_bytes: int = 0, host: str = "127.0.0.1", passes: Passes = asyncio.sleep
    ) -> None:
        if kind not in gpus():
            raise ConfigError(f"unknown GPU {kind!r}: known are {', '.join(gpus())}")
        self.kind = gpus()[kind]
        self.gpu = EmulatedGpu(hbm_bytes or self.kind.usable_bytes)
        self.engines: dict[str, _Resident] = {}
        self._host = host
        self._passes = passes
        name = "/engines/{name}"
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/state", self._state),
                Route(name, self._put, methods=["PUT"]),
                Route(f"{name}/start", self._start, methods=["POST"]),
                Route(f"{name}/stop", self._stop, methods=["POST"]),
                Route(f"{name}/limit_kv", self._limit_kv, methods=["POST"]),
            ]
        )

    def add(self, name: str, about: EngineOnGpu) -> None:
        """Know of an engine. One that runs stays as it is. Raises `ConfigError`, OSError where its port is taken."""
        if name not in self.engines or not self.engines[name].life:
            self.engines[name] = _Resident(name, about, self.gpu, self.kind, host=self._host, passes=self._passes)

    async def start_all(self) -> None:
        """Have all run, without delay, the KV memory shared equally. Raises `OutOfMemoryError`."""
        fixed = sum(e.served.weight_bytes + e.served.server_bytes for e in self.engines.values())
        for engine in self.engines.values():
            engine.limit_kv(max(0, self.gpu.usable_bytes - fixed) // len(self.engines))
            await engine.start(at_once=True)

    async def serve(self, *, port: int, on_ready: Callable[[str], None]) -> None:
        """Serve until SIGINT or SIGTERM; ``on_ready`` gets the URL of the process itself. Raises OSError."""
        with listen(self._host, port) as listener:
            url = url_of(listener).removesuffix("/v1")
            try:
                await server_of(self.app, lambda: on_ready(url)).serve(sockets=[listener])
            finally:
                for engine in self.engines.values():
                    await engine.stop()

    def state(self) -> dict[str, Any]:
        """What `/state` says."""
        for engine in self.engines.values():
            if engine.life and engine.life.live:
                engine.life.live.tell()
        gpu = self.gpu
        return {
            "gpu": self.kind.kind,
            "usable_bytes": gpu.usable_bytes,
            "mapped_bytes": gpu.mapped_bytes,
            "peak_bytes": gpu.peak_bytes,
            "refused": gpu.refused,
            "violations": gpu.violations,
            "engines": [engine.state() for engine in self.engines.values()],
        }

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _state(self, request: Request) -> Response:
        return JSONResponse(self.state())

    async def _put(self, request: Request) -> Response:
        try:
            self.add(request.path_params["name"], EngineOnGpu.model_validate_json(await request.body()))
        except (ValidationError, ConfigError, OSError) as e:
            return JSONResponse({"error": str(e)}, status_code=400)
        return JSONResponse(self.state())

    async def _start(self, request: Request) -> Response:
        async def start(engine: _Resident, said: Mapping[str, Any]) -> None:
            await engine.start(said.get("from"))

        return await self._done(request, start)

    async def _stop(self, request: Request) -> Response:
        async def stop(engine: _Resident, _said: Mapping[str, Any]) -> None:
            await engine.stop()

        return await self._done(request, stop)

    async def _limit_kv(self, request: Request) -> Response:
        async def limit(engine: _Resident, said: Mapping[str, Any]) -> None:
            engine.limit_kv(int(said["kv_bytes"]))

        return await self._done(request, limit)

    async def _done(
        self, request: Request, work: Callable[[_Resident, Mapping[str, Any]], Awaitable[None]]
    ) -> Response:
        engine = self.engines.get(request.path_params["name"])
        if engine is None:
            return JSONResponse({"error": f"no engine {request.path_params['name']!r} here"}, status_code=404)
        try:
            await work(engine, await request.json() if await request.body() else {})
        except OutOfMemoryError as e:
            return JSONResponse({"error": str(e)}, status_code=409)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
            return JSONResponse({"error": f"{type(e).__name__}: {e}"}, status_code=400)
        return JSONResponse(engine.state())
