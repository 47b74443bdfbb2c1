"""How the node agent moves a real vLLM server: start, sleep, wake, look, and take over one that runs.

``/health`` is 200 while a server sleeps, and requests that come then hang until it wakes. So nothing is believed here that the
server has not proven: awake is who says so *and* answers a request of one token; asleep is who says so after it was told.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

import httpx

from maestro_agents.errors import EngineUnavailable
from maestro_agents.nodes import Elastic
from maestro_serving.drivers import Look, NodeEngine, NodeGpu
from maestro_serving.kvcached import KvCached
from maestro_serving.processes import START_LIMIT_S, Kept, free_port, until_healthy, wait_for_port
from maestro_serving.vllm import Account, EngineCommand, read_account, vllm_command, vllm_program

MOVE_LIMIT_S: Final = 300.0
"""For one call of a sleep or wake. vLLM waits in it until running requests have ended; weights are read in it at disk speed."""

SERVES_LIMIT_S: Final = 30.0
"""How long a server that has woken may take for one token."""

LOOK_LIMIT_S: Final = 5.0
"""A server that makes tokens as fast as it can may take seconds to tell of itself; reports do not wait for that."""

_MEMORY_EVERY_S: Final = 5.0
"""Memory is read from /proc and nvidia-smi, which costs milliseconds."""

_DISK_BYTES_PER_S: Final = 0.2e9
"""A start takes this long for its weights at most, and `processes.START_LIMIT_S` besides."""


class VllmDriver:
    """See `drivers.Driver`. A model with ``launch.url`` is somebody else's server: it is watched, and moved only as far as its
    admin endpoints answer.
    """

    def __init__(self, engine: NodeEngine, gpu: NodeGpu, *, kvcached: KvCached | None = None) -> None:
        self._engine = engine
        self._gpu = gpu
        self._kv = kvcached
        self.elastic: Elastic = "enforced" if kvcached else "accounted"
        self._url = engine.launch.url
        self._kept = Kept(gpu.state / "engines", engine.engine_id)
        self._level = 1
        self._http = httpx.AsyncClient(timeout=LOOK_LIMIT_S, trust_env=False)
        self._memory_s = -_MEMORY_EVERY_S
        self._memory = (-1, -1)
        self._before = Account()
        self._limit_bytes = engine.kv_floor_bytes

    @property
    def name(self) -> str:
        """The model as its server knows it."""
        return self._engine.spec.served_model or self._engine.spec.model

    # -- the process -------------------------------------------------------------------------------------------------
    async def adopt(self) -> str | None:
        if self._engine.launch.url:
            return self._url
        if not await asyncio.to_thread(self._kept.adopt, self._command, model=self.name):
            return None
        self._url = f"http://127.0.0.1:{self._kept.port}/v1"
        return self._url

    async def start(self) -> str:
        engine_id, launch = self._engine.engine_id, self._engine.launch
        if launch.url:
            raise EngineUnavailable(f"engine {engine_id} at {launch.url} was not started here: start it where it runs")
        port = launch.port + self._gpu.index if launch.port else free_port()
        self._url = f"http://127.0.0.1:{port}/v1"
        await asyncio.to_thread(wait_for_port, engine_id, self._url)
        if self._kv is not None:
            await self._kv.forget(engine_id)
        log_from = self._kept.log.stat().st_size if self._kept.log.exists() else 0
        try:
            await asyncio.to_thread(self._kept.spawn, self._command(port), port=port, model=self.name)
        except FileNotFoundError as e:
            raise EngineUnavailable(f"engine {engine_id}: {e}") from None
        try:
            await until_healthy(
                engine_id,
                self._url,
                self._alive,
                limit_s=START_LIMIT_S + self._engine.weight_bytes / _DISK_BYTES_PER_S,
                log=self._kept.log,
                log_from=log_from,
            )
            await self._serves()
            if self._kv is not None:
                if not self._kv.runs(engine_id):
                    raise EngineUnavailable(f"engine {engine_id} came up without kvcached: see {self._kept.log}")
                await self._kv.limit(engine_id, self._limit_bytes)
        except BaseException:
            await self.stop()
            raise
        return self._url

    def _command(self, port: int) -> EngineCommand:
        spec, launch = self._engine.spec, self._engine.launch
        on_cpu = self._gpu.kind == "cpu"
        command = vllm_command(
            program=vllm_program(),
            model=launch.model_path or spec.model,
            served_model=self.name,
            port=port,
            max_num_seqs=spec.slots,
            max_model_len=spec.max_model_len,
            kv_cache_memory_bytes=spec.kv_bytes,
            cpu_core=self._gpu.cpu_core if on_cpu else None,
            gpus=() if on_cpu else tuple(int(g.rpartition(".")[2]) for g in self._engine.gpus),
            sleeps=self._engine.sleeps,
            args=launch.args,
        )
        if self._kv is None:
            return command
        return dataclasses.replace(command, env={**command.env, **self._kv.env(self._engine.engine_id)})

    async def stop(self) -> None:
        if self._engine.launch.url:
            return
        await asyncio.shield(asyncio.to_thread(self._kept.stop))
        if self._kv is not None:
            await self._kv.forget(self._engine.engine_id)

    async def close(self) -> None:
        await self._http.aclose()

    def _alive(self) -> bool:
        self._kept.renew()
        return self._kept.alive()

    # -- sleep and wake ----------------------------------------------------------------------------------------------
    async def sleep(self, level: int) -> None:
        # mode=wait: should a request have come after all, it is served first.
        await self._post(f"/sleep?level={level}&mode=wait")
        self._level = level
        if not await self._asleep():
            raise EngineUnavailable(f"engine {self._engine.engine_id} was put to sleep and says that it is awake")

    async def wake(self) -> None:
        account = await self._account()
        level = account.asleep if account and account.asleep else self._level
        if level == 2:
            # Weights were dropped: their memory, then their bytes, then KV memory. One left out makes answers noise.
            await self._post("/wake_up?tags=weights")
            await self._post("/collective_rpc", {"method": "reload_weights"})
            await self._post("/wake_up?tags=kv_cache")
        else:
            await self._post("/wake_up")
        if await self._asleep():
            raise EngineUnavailable(f"engine {self._engine.engine_id} was woken and says that it sleeps")
        await self._serves()

    async def limit_kv(self, kv_bytes: int) -> None:
        self._limit_bytes = kv_bytes
        if self._kv is not None and self._kv.runs(self._engine.engine_id):
            await self._kv.limit(self._engine.engine_id, kv_bytes)

    async def _post(self, path: str, body: Any = None, limit_s: float = MOVE_LIMIT_S) -> httpx.Response:
        url = f"{self._base}{path}"
        work = asyncio.ensure_future(self._http.post(url, json=body, timeout=limit_s, headers=self._key()))
        try:
            while not work.done():  # one that dies meanwhile would be waited for in vain
                await asyncio.wait([work], timeout=0.5)
                if not work.done() and not self._engine.launch.url and not self._alive():
                    raise EngineUnavailable(f"engine {self._engine.engine_id} died during POST {path}")
            answer = work.result()
        except httpx.HTTPError as e:
            raise EngineUnavailable(
                f"engine {self._engine.engine_id}: POST {path}: {str(e) or type(e).__name__}"
            ) from e
        finally:
            work.cancel()
        if answer.status_code != 200:
            raise EngineUnavailable(
                f"engine {self._engine.engine_id}: POST {path} answers {answer.status_code}: {answer.text[:200]}"
            )
        return answer

    async def _asleep(self) -> bool:
        try:
            answer = await self._http.get(f"{self._base}/is_sleeping")
            return bool(answer.json()["is_sleeping"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as e:
            raise EngineUnavailable(
                f"engine {self._engine.engine_id} does not say whether it sleeps: {str(e) or type(e).__name__}"
            ) from e

    async def _serves(self) -> None:
        """Raise `EngineUnavailable` unless it makes a token."""
        body = {"model": self.name, "prompt": "Hi", "max_tokens": 1, "temperature": 0.0}
        answer = await self._post("/v1/completions", body, limit_s=SERVES_LIMIT_S)
        try:
            reason = answer.json()["choices"][0]["finish_reason"]
        except (ValueError, KeyError, IndexError, TypeError):
            reason = None
        if reason not in {"length", "stop"}:
            raise EngineUnavailable(f"engine {self._engine.engine_id} is awake and does not serve ({reason})")

    @property
    def _base(self) -> str:
        return self._url.removesuffix("/v1")

    def _key(self) -> dict[str, str]:
        name = self._engine.spec.api_key_env
        key = os.environ.get(name, "") if name else ""
        return {"Authorization": f"Bearer {key}"} if key else {}

    # -- looking -----------------------------------------------------------------------------------------------------
    async def look(self) -> Look:
        if not self._engine.launch.url and not self._alive():
            return Look(alive=False)
        try:
            health = await self._http.get(f"{self._base}/health")
        except (httpx.HTTPError, httpx.InvalidURL):
            return Look(alive=not self._engine.launch.url)
        account = await self._account() or Account()
        asleep = account.asleep
        if asleep is None and self._engine.sleeps:
            with contextlib.suppress(EngineUnavailable):  # a version that does not say it in its metrics
                asleep = self._level if await self._asleep() else None
        host_bytes, device_bytes = await self._measure()
        before, self._before = self._before, account
        asked = account.queried - before.queried if before.queried >= 0 else 0.0
        kv_used = int(account.kv_use * self._engine.spec.kv_bytes) if account.kv_use >= 0 else -1
        if self._kv is not None:
            kv_used = await asyncio.to_thread(self._kv.used_bytes, self._engine.engine_id)
        return Look(
            alive=True,
            healthy=health.status_code == 200,
            asleep=asleep,
            running=account.running,
            waiting=account.waiting,
            kv_used_bytes=kv_used,
            host_bytes=host_bytes,
            device_bytes=device_bytes,
            generated_tokens=int(account.generated),
            prefix_hit_rate=(account.found - before.found) / asked if asked > 0 else -1.0,
            preemptions=account.preemptions,
        )

    async def _account(self) -> Account | None:
        try:
            page = await self._http.get(f"{self._base}/metrics")
        except httpx.HTTPError:
            return None
        return read_account(page.text, self.name) if page.status_code == 200 else None

    async def _measure(self) -> tuple[int, int]:
        if self._kept.pid and time.monotonic() - self._memory_s > _MEMORY_EVERY_S:
            self._memory_s = time.monotonic()
            self._memory = await asyncio.to_thread(memory_of, self._kept.pid)
        return self._memory


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes of a process and all below it: proportional set size, and memory on GPUs. -1 where the system does not say."""
    pids = _tree(pid)
    host = [_pss(p) for p in pids]
    return (sum(host) if pids and min(host) >= 0 else -1), _device(pids)


def _tree(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = entry.read_text(encoding="utf-8", errors="replace")
            children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(int(entry.parent.name))
    found: set[int] = set()
    ahead = [pid]
    while ahead:
        found.add(ahead[-1])
        ahead += [c for c in children.get(ahead.pop(), ()) if c not in found]
    return found


def _pss(pid: int) -> int:
    """0 for one that has ended meanwhile."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace")
        return next(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return 0 if Path("/proc/self").exists() else -1
    except OSError:
        return -1


def _device(pids: Collection[int], which: Callable[[str], str | None] = shutil.which) -> int:
    program = which("nvidia-smi")
    if program is None:
        return -1
    try:
        said = subprocess.run(
            [program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return -1
    found = -1  # in a container nvidia-smi may name pids that are not ours to see
    for line in said.splitlines():
        app, _, mib = line.partition(",")
        if app.strip().isdecimal() and mib.strip().isdecimal() and int(app) in pids:
            found = max(0, found) + int(mib) * 2**20
    return found
