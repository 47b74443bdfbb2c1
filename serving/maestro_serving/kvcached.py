"""kvcached (github.com/ovg-project/kvcached): a vLLM whose KV memory takes physical memory as it fills, under a limit that can be moved.

It is a plugin of the vLLM installation, switched on by environment variables (`KvCached.env`). Each engine has a segment of
shared memory by its name: the limit, what is used, what is mapped ahead. ``kvctl limit`` writes the limit; the engine reads
it at its next allocation. A lower one takes nothing away: blocks come back as requests end or are preempted.

Read from its source and issues (docs/gpu-memory.md says which), tried against a program that behaves alike, never on a GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from maestro_agents.errors import EngineUnavailable
from maestro_serving.vllm import VLLM_ENV

TIMEOUT_S: Final = 30.0
"""For one call of ``kvctl``: it may import PyTorch."""

_SEGMENT: Final = struct.Struct("=3q")
"""Limit, used, mapped ahead: bytes (kvcached's MemInfoStruct). It has no version, so its size is all that can be checked."""


@dataclass(kw_only=True)
class KvCached:
    """kvcached as it is installed beside vLLM. ``program``: its ``kvctl``."""

    program: str
    #: Where its segments are.
    folder: Path = Path("/dev/shm")  # noqa: S108
    #: What each segment could hold at first, by name: a limit is split in these proportions.
    _capacities: dict[str, int] = field(default_factory=dict[str, int])

    @classmethod
    def find(cls) -> Self | None:
        """None: it is not installed. Looks beside the ``vllm`` program first, since it must be in the same environment."""
        vllm = shutil.which(os.environ.get(VLLM_ENV) or "vllm")
        beside = shutil.which("kvctl", path=str(Path(vllm).parent)) if vllm else None
        program = beside or shutil.which("kvctl")
        return cls(program=program) if program else None

    @staticmethod
    def name(engine_id: str) -> str:
        """The name that an engine's segment gets: kvcached keeps letters, digits, ``-`` and ``_``, 64 at most."""
        return f"maestro_{re.sub(r'[^A-Za-z0-9_-]', '-', engine_id)}"[:64]

    @classmethod
    def env(cls, engine_id: str) -> Mapping[str, str]:
        """What switches it on in a vLLM server. Whether it then really is, `runs` says: a broken installation is silent."""
        return {
            "ENABLE_KVCACHED": "true",
            "KVCACHED_AUTOPATCH": "1",
            "KVCACHED_IPC_NAME": cls.name(engine_id),
        }

    def runs(self, engine_id: str) -> bool:
        """Whether a server came up with it. A segment may outlive its server (`forget`), so ask of a server that lives."""
        return bool(self._read(engine_id))

    def used_bytes(self, engine_id: str) -> int:
        """Physical memory that its KV cache has, what is mapped ahead included; -1 where that cannot be read."""
        pools = self._read(engine_id)
        return sum(used + ahead for _, used, ahead in pools.values()) if pools else -1

    async def limit(self, engine_id: str, kv_bytes: int) -> None:
        """Let the engine have so much KV memory, and return once that is written. Raises `EngineUnavailable`.

        An engine with several KV cache groups has a segment for each; they share as they did at first.
        """
        if kv_bytes <= 0:
            raise ValueError(f"{engine_id}: kvcached ends an engine that is limited to nothing")
        pools = self._read(engine_id)
        if not pools:
            raise EngineUnavailable(
                f"kvcached has no segment {self.name(engine_id)!r} in {self.folder}: the engine is not up, or its vLLM "
                "runs without kvcached (is it installed in the same environment?)"
            )
        for name, (limit, _, _) in pools.items():
            self._capacities.setdefault(name, limit)
        whole = sum(self._capacities[name] for name in pools) or len(pools)
        for name in pools:
            share = max(1, kv_bytes * self._capacities[name] // whole)
            said = await self._kvctl("limit", name, str(share))
            if self._read(engine_id).get(name, (-1,))[0] != share:  # older ones refuse with exit status 0
                raise EngineUnavailable(f"kvctl did not limit {name} to {share} bytes: {said}")

    async def forget(self, engine_id: str) -> None:
        """Remove what an ended server left: kvcached's segments outlive it. Never raises."""
        with contextlib.suppress(EngineUnavailable):
            for name in self._read(engine_id):
                self._capacities.pop(name, None)
                await self._kvctl("delete", name)

    def _read(self, engine_id: str) -> dict[str, tuple[int, int, int]]:
        """(limit, used, mapped ahead) of the engine's segments; empty where one is unlike what is known of them."""
        base = self.name(engine_id)
        found: dict[str, tuple[int, int, int]] = {}
        for path in (self.folder / base, *sorted(self.folder.glob(f"{base}_g[1-9]*"))):
            try:
                body = path.read_bytes()
            except OSError:
                continue
            if len(body) != _SEGMENT.size:
                return {}
            found[path.name] = _SEGMENT.unpack(body)
        return found

    async def _kvctl(self, *args: str) -> str:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("ENABLE_KVCACHED", "KVCACHED_"))}
        try:
            process = await asyncio.create_subprocess_exec(
                self.program,
                *args,
                env={**env, "NO_COLOR": "1"},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        except OSError as e:
            raise EngineUnavailable(f"{self.program}: {e}") from e
        try:
            out, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
        except TimeoutError as e:
            raise EngineUnavailable(f"{self.program} {' '.join(args)}: no answer within {TIMEOUT_S:.0f} s") from e
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        said = " ".join(out.decode(errors="replace").split())[:200]
        if process.returncode:
            raise EngineUnavailable(f"{self.program} {' '.join(args)}: {said or f'exit status {process.returncode}'}")
        return said
