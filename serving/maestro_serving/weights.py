"""Weights in tiers: which moves there are, what each does, what it costs, and what of a model's files is in the page cache.

A move is a row of `DOES`. What each took is learned per engine, in both directions, and kept in the node's state folder;
until it was made once, it is estimated from bytes and the hardware profile.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import heapq
import json
import mmap
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from maestro_agents.nodes import MOVES, Tier
from maestro_agents.simulator.hardware import Model, Served, Tiers, gpus, tiers

Does = Literal["fetch", "read", "forget", "start", "sleep 1", "sleep 2", "wake", "stop", "stop, forget"]

DOES: Final[Mapping[tuple[Tier, Tier], Does]] = {
    ("remote", "disk"): "fetch",
    ("disk", "host"): "read",
    ("host", "disk"): "forget",
    ("disk", "gpu"): "start",
    ("host", "gpu"): "start",
    ("gpu", "sleeping"): "sleep 1",
    ("gpu", "dropped"): "sleep 2",
    ("sleeping", "gpu"): "wake",
    ("dropped", "gpu"): "wake",
    ("gpu", "host"): "stop",
    ("sleeping", "host"): "stop",
    ("dropped", "host"): "stop",
    ("gpu", "disk"): "stop, forget",
    ("sleeping", "disk"): "stop, forget",
    ("dropped", "disk"): "stop, forget",
}
"""What each move of `maestro_agents.nodes.MOVES` does: start, sleep, wake and stop are the driver's (`drivers.Driver`)."""

HAS_SERVER: Final[frozenset[Tier]] = frozenset({"gpu", "sleeping", "dropped"})

IN_CACHE: Final = 0.9
"""Share of a model's files that must be in the page cache for it to count as there."""

_KEEP: Final = 0.7
"""What the past counts in a faded mean when one more move was measured."""

_CHUNK_BYTES: Final = 16 << 20


# -- what a move costs -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a move takes, and how often it was measured; 0: an estimate."""

    took_s: float
    moved_bytes: int = 0
    measured: int = 0


class Costs:
    """Learned costs of the moves of a node's engines; a faded mean, kept in ``file`` where one is given."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._seen: dict[str, Cost] = {}
        if file is not None:
            # A damaged file costs what was learned, nothing else.
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                kept: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
                self._seen = {key: Cost(**cost) for key, cost in kept.items()}

    def learn(self, engine_id: str, was: Tier, to: Tier, *, took_s: float, moved_bytes: int) -> None:
        """One more move was made. Writes the file."""
        key = _key(engine_id, was, to)
        old = self._seen.get(key)
        new = Cost(took_s=took_s, moved_bytes=moved_bytes, measured=1)
        if old is not None:
            new = Cost(
                took_s=_KEEP * old.took_s + (1 - _KEEP) * took_s, moved_bytes=moved_bytes, measured=old.measured + 1
            )
        self._seen[key] = new
        if self._file is not None:
            write_whole(self._file, json.dumps({k: dataclasses.asdict(c) for k, c in self._seen.items()}, indent=1))

    def cost(self, engine_id: str, was: Tier, to: Tier, estimate: Cost) -> Cost:
        """Of one move: measured, else the estimate."""
        return self._seen.get(_key(engine_id, was, to), estimate)


def _key(engine_id: str, was: Tier, to: Tier) -> str:
    return f"{engine_id} {was}>{to}"


def estimate(was: Tier, to: Tier, weight_bytes: int, served: Served | None) -> Cost:
    """Of a move that was never made: by the profile of its model and GPU, else as an A100 would, from bytes alone."""
    t = served.tiers if served else _as_an_a100(weight_bytes)
    seconds: Mapping[tuple[Tier, Tier], float] = {
        ("remote", "disk"): t.from_remote_s - t.from_disk_s,
        ("disk", "host"): t.from_disk_s - t.from_host_s,
        ("disk", "gpu"): t.from_disk_s,
        ("host", "gpu"): t.from_host_s,
        ("gpu", "sleeping"): t.to_sleeping_s,
        ("sleeping", "gpu"): t.from_sleeping_s,
        ("dropped", "gpu"): t.reload_s,
    }
    return Cost(took_s=max(0.0, seconds.get((was, to), t.discard_s)), moved_bytes=carried(was, to, weight_bytes))


def _as_an_a100(weight_bytes: int) -> Tiers:
    unknown = Model(
        profile="", name="", parameters=weight_bytes // 2, max_tokens=0, layers=0, config={}, source="its bytes"
    )
    return tiers(unknown, gpus()["a100-80g"], 1)


def carried(was: Tier, to: Tier, weight_bytes: int) -> int:
    """Bytes of weights that a move carries: none where they are only let go of."""
    return 0 if "stop" in DOES[was, to] or DOES[was, to] in {"sleep 2", "forget"} else weight_bytes


# -- ways ----------------------------------------------------------------------------------------------------------------
def way(was: Tier, to: Tier, seconds: Mapping[tuple[Tier, Tier], float], can: frozenset[Tier]) -> list[Tier]:
    """The moves from one tier to another, as few as there are, among those the quickest; only by tiers that the engine can
    be in. Empty: it is there, or there is no way.
    """
    heap: list[tuple[int, float, Sequence[Tier]]] = [(0, 0.0, (was,))]
    done: set[Tier] = set()
    while heap:
        moves, took_s, path = heapq.heappop(heap)
        here = path[-1]
        if here == to:
            return list(path[1:])
        if here in done:
            continue
        done.add(here)
        for there in MOVES[here] & can - done:
            further: Sequence[Tier] = (*path, there)
            heapq.heappush(heap, (moves + 1, took_s + seconds.get((here, there), 0.0), further))
    return []


# -- files and the page cache ------------------------------------------------------------------------------------------
def weight_files(folder: Path) -> tuple[Path, ...]:
    """The weights in a model's folder: safetensors, else PyTorch's own files; empty where it holds none."""
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf"):
        if found := tuple(sorted(folder.glob(pattern))):
            return found
    return ()


def size_bytes(files: Sequence[Path]) -> int:
    """In all."""
    return sum(f.stat().st_size for f in files)


def cached_bytes(files: Sequence[Path]) -> int | None:
    """How much of these files is in the page cache; None where the system does not say.

    By ``mincore`` on a mapping, which reads nothing (a read with RWF_NOWAIT would start reading ahead). Linux says it to a
    file's owner only; to others everything seems to be there.
    """
    total = 0
    try:
        for file in files:
            total += _cached(file)
    except (OSError, AttributeError, ValueError):
        return None
    return total


def in_cache(files: Sequence[Path]) -> bool:
    """Whether a server that starts now reads these files from memory; False where nobody knows."""
    cached = cached_bytes(files) if files else None
    return cached is not None and cached >= IN_CACHE * size_bytes(files)


def _cached(file: Path) -> int:
    with file.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        if not size:
            return 0
        # Private and writable, so that its address can be had; nothing is written.
        with mmap.mmap(f.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
            libc = ctypes.CDLL(None, use_errno=True)
            pages = -(-size // mmap.PAGESIZE)
            states = ctypes.create_string_buffer(pages)
            view = (ctypes.c_char * size).from_buffer(mapped)
            try:
                address = ctypes.c_void_p(ctypes.addressof(view))
                if libc.mincore(address, ctypes.c_size_t(size), states):
                    raise OSError(ctypes.get_errno(), "mincore")
            finally:
                del view  # else the mapping cannot be closed
            return min(size, sum(state & 1 for state in states.raw) * mmap.PAGESIZE)


async def read(files: Sequence[Path]) -> None:
    """Bring files into the page cache by reading them. Raises `OSError`. Cancelled, it stops soon."""
    stop = threading.Event()
    work = asyncio.ensure_future(asyncio.to_thread(_read, files, stop))
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        with contextlib.suppress(OSError):
            await work
        raise


def _read(files: Sequence[Path], stop: threading.Event) -> None:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    for file in files:
        with file.open("rb", buffering=0) as f:
            while not stop.is_set() and f.readinto(buffer):
                pass


async def forget(files: Sequence[Path]) -> None:
    """Let go of files in the page cache, as far as the system can (POSIX_FADV_DONTNEED; macOS has no such call)."""
    await asyncio.to_thread(_forget, files)


def _forget(files: Sequence[Path]) -> None:
    if sys.platform == "darwin":
        return
    for file in files:
        with contextlib.suppress(OSError), file.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_whole(file: Path, text: str) -> None:
    """Write a small file so that a reader, and a crash, see the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)
