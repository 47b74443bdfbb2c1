"""How the node agent moves engines of an emulated GPU (`maestro_serving.emulated_gpu`): one process to a GPU, all its engines in it.

Start, stop and KV limits go to the process, sleep and wake to vLLM's own endpoints at the engine's port, as with a real vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import httpx

from maestro_agents.errors import EngineUnavailable
from maestro_agents.nodes import Elastic
from maestro_serving.drivers import Look, NodeEngine, NodeGpu
from maestro_serving.emulated_gpu import EngineOnGpu
from maestro_serving.processes import START_LIMIT_S, Kept, free_port, until_healthy
from maestro_serving.vllm import EngineCommand

MOVE_LIMIT_S: Final = 600.0
"""For one call that moves weights, or waits until running requests have ended."""

LOOK_LIMIT_S: Final = 1.5
SERVES_LIMIT_S: Final = 30.0
"""How long an engine that has woken may take for one token."""


class EmulatedGpus:
    """Makes the drivers of emulated engines (a `node.DriverOf`); those on one GPU share its process."""

    def __init__(self) -> None:
        self._processes: dict[str, _Process] = {}

    def __call__(self, engine: NodeEngine, gpu: NodeGpu) -> EmulatedDriver:
        return EmulatedDriver(engine, self._processes.setdefault(gpu.gpu_id, _Process(gpu)))


class EmulatedDriver:
    """See `drivers.Driver`. ``--speed X`` among ``launch.args``: so much faster than the hardware, moves included."""

    elastic: Elastic = "enforced"

    def __init__(self, engine: NodeEngine, process: _Process) -> None:
        self._engine = engine
        self._process = process
        process.drivers += 1
        self._url = ""
        self._kv_bytes = engine.kv_floor_bytes
        self._seen = (0, 0)

    @property
    def id(self) -> str:
        return self._engine.engine_id

    async def start(self) -> str:
        try:
            await self._process.up(self.id)
            await self._process.ask("PUT", f"/engines/{self.id}", self._about().model_dump())
            said = await self._process.ask("POST", f"/engines/{self.id}/start", {"from": "disk"})
        except BaseException:
            await self.stop()
            raise
        finally:
            self._process.starting.discard(self.id)
        self._url = str(said["url"])
        return self._url

    async def adopt(self) -> str | None:
        if not await self._process.adopt():
            return None
        with contextlib.suppress(EngineUnavailable):
            self._url = str((await self._state()).get("url", ""))
        return self._url or None

    async def stop(self) -> None:
        self._url = ""
        await self._process.stop(self.id)

    async def sleep(self, level: int) -> None:
        await self._tell(f"/sleep?level={level}&mode=wait")

    async def wake(self) -> None:
        if (await self._state()).get("sleep_level") == 2:
            await self._tell("/wake_up?tags=weights")
            await self._tell("/collective_rpc", {"method": "reload_weights"})
            await self._tell("/wake_up?tags=kv_cache")
        else:
            await self._tell("/wake_up")
        one = {"prompt": "x", "max_tokens": 1}
        await self._tell("/v1/completions", one, timeout_s=SERVES_LIMIT_S)

    async def limit_kv(self, kv_bytes: int) -> None:
        self._kv_bytes = kv_bytes
        if self._url:
            await self._process.ask("POST", f"/engines/{self.id}/limit_kv", {"kv_bytes": kv_bytes})

    async def look(self) -> Look:
        try:
            state = await self._state() if self._process.alive() else {}
        except EngineUnavailable:
            return Look(alive=self._process.alive())
        if not state.get("url"):
            return Look(alive=False)
        seen = (int(state["prefix_queries"]), int(state["prefix_hits"]))
        queries, hits = (now - before for now, before in zip(seen, self._seen, strict=True))
        self._seen = seen
        return Look(
            alive=True,
            healthy=True,
            asleep=state["sleep_level"],
            running=state["running"],
            waiting=state["waiting"],
            kv_used_bytes=state["kv_used_bytes"],
            host_bytes=state["host_bytes"],
            device_bytes=state["hbm_bytes"],
            prefix_hit_rate=hits / queries if queries > 0 else -1.0,
            preemptions=state["preemptions"],
        )

    async def close(self) -> None:
        await self._process.close()

    def _about(self) -> EngineOnGpu:
        spec, served = self._engine.spec, self._engine.served
        if served is None or len(self._engine.gpus) != 1:
            raise EngineUnavailable(f"engine {self.id}: an emulated GPU holds models with a profile, each on one GPU")
        args = self._engine.launch.args
        said = dict(zip(args[::2], args[1::2], strict=False))
        try:
            return EngineOnGpu(
                profile=served.model.profile,
                model=spec.served_model or spec.model,
                port=self._engine.launch.port,
                slots=spec.slots,
                max_model_len=spec.max_model_len,
                max_num_queued_reqs=int(said.get("--max-num-queued-reqs", 0)),
                kv_bytes=self._kv_bytes,
                speed=float(said.get("--speed", 1.0)),
            )
        except ValueError as e:
            raise EngineUnavailable(f"engine {self.id}: launch.args {' '.join(args)}: {e}") from None

    async def _state(self) -> dict[str, Any]:
        state = await self._process.ask("GET", "/state", timeout_s=LOOK_LIMIT_S)
        engines: list[dict[str, Any]] = state["engines"]
        return next((e for e in engines if e["name"] == self.id), dict[str, Any]())

    async def _tell(self, path: str, body: object = None, *, timeout_s: float = MOVE_LIMIT_S) -> None:
        url = f"{self._url.removesuffix('/v1')}{path}"
        await self._process.send("POST", url, body, timeout_s=timeout_s, who=f"engine {self.id}")


class _Process:
    """The process of one emulated GPU. It outlives its agent as a real server does (`processes.Kept`)."""

    def __init__(self, gpu: NodeGpu) -> None:
        self._gpu = gpu
        self.drivers = 0
        self._kept = Kept(gpu.state / "engines", f"emulated-{gpu.gpu_id}")
        #: Engines that need it, though they do not run yet.
        self.starting: set[str] = set()
        self._changing = asyncio.Lock()
        self._http = httpx.AsyncClient(timeout=MOVE_LIMIT_S, trust_env=False)

    def alive(self) -> bool:
        self._kept.renew()
        return self._kept.alive()

    async def up(self, engine_id: str) -> None:
        """Have it run, for an engine that starts. Raises `EngineUnavailable`."""
        self.starting.add(engine_id)
        async with self._changing:
            if self.alive():
                return
            await asyncio.to_thread(self._kept.stop)
            port = free_port()
            log_from = self._kept.log.stat().st_size if self._kept.log.exists() else 0
            await asyncio.to_thread(self._kept.spawn, self._command(port), port=port, model=self._gpu.kind)
            await until_healthy(
                f"of {self._gpu.gpu_id}",
                f"http://127.0.0.1:{port}/v1",
                self.alive,
                limit_s=START_LIMIT_S,
                log=self._kept.log,
                log_from=log_from,
            )

    async def adopt(self) -> bool:
        """Take over the one that an agent before us started. False: there is none."""
        async with self._changing:
            if self._kept.pid and self.alive():
                return True
            return await asyncio.to_thread(self._kept.adopt, self._command, model=self._gpu.kind)

    async def stop(self, engine_id: str) -> None:
        """End an engine, and with the last one the process."""
        self.starting.discard(engine_id)
        async with self._changing:
            left = bool(self.starting)
            with contextlib.suppress(EngineUnavailable):
                if self.alive():
                    await self.ask("POST", f"/engines/{engine_id}/stop", timeout_s=10.0)
            with contextlib.suppress(EngineUnavailable):
                if self.alive():
                    state = await self.ask("GET", "/state", timeout_s=10.0)
                    left = left or any(e["to"] in {"gpu", "sleeping", "dropped"} for e in state["engines"])
            if not left:
                await asyncio.shield(asyncio.to_thread(self._kept.stop))

    async def close(self) -> None:
        self.drivers -= 1
        if not self.drivers:
            await self._http.aclose()

    async def ask(self, method: str, path: str, body: object = None, *, timeout_s: float = MOVE_LIMIT_S) -> Any:
        """What the process says. Raises `EngineUnavailable`."""
        url = f"http://127.0.0.1:{self._kept.port}{path}"
        return await self.send(method, url, body, timeout_s=timeout_s, who=f"emulated GPU {self._gpu.gpu_id}")

    async def send(self, method: str, url: str, body: object, *, timeout_s: float, who: str) -> Any:
        """What answers to a request. Raises `EngineUnavailable`, with the words of the refusal."""
        try:
            reply = await self._http.request(method, url, json=body, timeout=timeout_s)
        except httpx.HTTPError as e:
            raise EngineUnavailable(f"{who} does not answer {method} {url}: {e or type(e).__name__}") from None
        if reply.status_code != 200:
            raise EngineUnavailable(f"{who}: {_why(reply)}")
        return reply.json()

    def _command(self, port: int) -> EngineCommand:
        gpu = self._gpu
        argv = [sys.executable, "-m", "maestro_agents.cli", "emulate", "--gpu", gpu.kind, "--port", str(port)]
        argv += ["--hbm-gb", str(gpu.usable_bytes / 1e9)]
        # The child must find what we found, in an editable checkout as in an installed wheel.
        return EngineCommand(argv=tuple(argv), env={"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})


def _why(reply: httpx.Response) -> str:
    try:
        said: Any = reply.json()["error"]
    except (ValueError, KeyError, TypeError):
        return f"status {reply.status_code}"
    return str(cast("dict[str, Any]", said).get("message")) if isinstance(said, dict) else str(said)


async def states(node: Path) -> Mapping[int, Mapping[str, Any]]:
    """What the emulated GPUs of a node say of themselves (`emulated_gpu.GpuProcess.state`), by process. ``node``: its state folder."""
    found: dict[int, Mapping[str, Any]] = {}
    async with httpx.AsyncClient(timeout=LOOK_LIMIT_S, trust_env=False) as http:
        for path in await asyncio.to_thread(lambda: sorted(node.glob("engines/emulated-*.json"))):
            with contextlib.suppress(OSError, ValueError, KeyError, httpx.HTTPError):
                said = json.loads(await asyncio.to_thread(path.read_text, encoding="utf-8"))
                found[int(said["pid"])] = (await http.get(f"http://127.0.0.1:{said['port']}/state")).json()
    return found
