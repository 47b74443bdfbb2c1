"""How fast weights move: disk, page cache, host memory, pinned host memory, HBM."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from findings import GB, Findings

CHUNK = 16 * 2**20
REPEATS = 3

HBM_MOVES = (
    "pinned host -> HBM",
    "HBM -> pinned host",
    "pageable host -> HBM",
    "HBM -> HBM",
    "page cache -> pinned host -> HBM",
    "allocation of pinned host memory",
)


def timed(move: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Seconds of each run, after one that does not count."""
    move()
    took: list[float] = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        move()
        took.append(time.perf_counter() - began_s)
    return took


def free_memory() -> int:
    """Bytes that the host can give without swapping, its control group's limit included."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    info = Path("/proc/meminfo")
    if info.exists():
        free = next((int(x.split()[1]) * 1024 for x in info.read_text().splitlines() if x.startswith("MemAvail")), free)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def host_memory(found: Findings, sizes: Sequence[int]) -> None:
    """One memory copy on one core: the floor under every move that goes through pageable memory."""
    for size in sizes:
        if 2 * size > 0.8 * free_memory():
            found.skip(f"host -> host, {size / GB:g} GB", f"{free_memory() / GB:.1f} GB of host memory are free")
            continue
        source, target = mmap.mmap(-1, size), mmap.mmap(-1, size)
        views = memoryview(source), memoryview(target)

        def copy(views: tuple[memoryview, memoryview] = views) -> None:
            views[1][:] = views[0]

        found.moved("host -> host", size, timed(copy))
        for view in views:
            view.release()
        source.close()
        target.close()


# -- disk ----------------------------------------------------------------------------------------------------------------
def disk(found: Findings, sizes: Sequence[int], folder: Path | None) -> None:
    """Files as large as weights: written, read cold, read from the page cache; into one buffer, as loaders read them."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="gpu-check-") as place:
        for size in sizes:
            free, memory = shutil.disk_usage(place).free, free_memory()
            if size > 0.8 * free or size + CHUNK > 0.8 * memory:
                why = f"{place}: {free / GB:.1f} GB of disk, {memory / GB:.1f} GB of memory are free"
                for what in ("host -> disk", "disk -> host", "page cache -> host"):
                    found.skip(f"{what}, {size / GB:g} GB", why)
                continue
            path = Path(place) / "weights"
            found.moved("host -> disk", size, [write(path, size)], note="written and synced")
            _cold(found, path, size)
            found.moved("page cache -> host", size, timed(lambda p=path: read(p)))
            threads = min(8, os.cpu_count() or 1)
            if threads > 1:
                found.moved(f"page cache -> host, {threads} threads", size, timed(lambda p=path, n=threads: read(p, n)))
            path.unlink()


def _cold(found: Findings, path: Path, size: int) -> None:
    took: list[float] = []
    for _ in range(REPEATS):
        left = forget(path)
        if left > 0.01:
            found.skip(
                f"disk -> host, {size / GB:g} GB", f"{left:.0%} of the file stays in memory (tmpfs, or no fadvise)"
            )
            return
        began_s = time.perf_counter()
        read(path)
        took.append(time.perf_counter() - began_s)
    found.moved("disk -> host", size, took, note="one thread; nothing of it in the page cache before")


def write(path: Path, size: int) -> float:
    """Seconds to write so many random bytes and have them on disk."""
    chunk = os.urandom(min(size, CHUNK))
    began_s = time.perf_counter()
    with path.open("wb", buffering=0) as f:
        while (left := size - f.tell()) > 0:
            f.write(memoryview(chunk)[:left])
        os.fsync(f.fileno())
    return time.perf_counter() - began_s


def read(path: Path, threads: int = 1) -> None:
    """Read all of a file, each thread its part, into buffers that are used again and again."""
    size = path.stat().st_size
    part = -(-size // threads)

    def run(begin: int, end: int) -> None:
        buffer = memoryview(bytearray(min(CHUNK, size)))
        with path.open("rb", buffering=0) as f:
            while begin < end:
                n = os.preadv(f.fileno(), [buffer[: min(len(buffer), end - begin)]], begin)
                if n == 0:
                    raise OSError(f"{path} ended early")
                begin += n

    workers = [threading.Thread(target=run, args=(i * part, min(size, (i + 1) * part))) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def forget(path: Path) -> float:
    """Ask the kernel to drop a file from the page cache; return the share that stayed (`mincore`), 1.0 where it cannot be told."""
    with path.open("r+b") as f:
        os.fsync(f.fileno())
        if not hasattr(os, "posix_fadvise"):
            return 1.0
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = path.stat().st_size
        pages = -(-size // mmap.PAGESIZE)
        there = (ctypes.c_ubyte * pages)()
        with mmap.mmap(f.fileno(), size) as view:
            first = ctypes.c_char.from_buffer(view)
            address = ctypes.addressof(first)
            failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), there)
            del first
        return 1.0 if failed else sum(b & 1 for b in bytes(there)) / pages


# -- HBM -----------------------------------------------------------------------------------------------------------------
def hbm(found: Findings, sizes: Sequence[int], folder: Path | None, torch: Any) -> None:
    """Copies between this host and its GPUs. ``torch`` has CUDA."""
    for size in sizes:
        free, memory = torch.cuda.mem_get_info()[0], free_memory()
        if 2 * size > 0.9 * free or 2 * size > 0.8 * memory:
            why = f"{free / GB:.1f} GB of HBM, {memory / GB:.1f} GB of host memory are free"
            for what in HBM_MOVES:
                found.skip(f"{what}, {size / GB:g} GB", why)
            continue
        began_s = time.perf_counter()
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        took_s = time.perf_counter() - began_s
        found.moved("allocation of pinned host memory", size, [took_s], note="a first sleep pays for it")
        there, other = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
        found.moved("pinned host -> HBM", size, copies(torch, [(there, pinned)]))
        found.moved("HBM -> pinned host", size, copies(torch, [(pinned, there)]))
        found.moved("HBM -> HBM", size, copies(torch, [(other, there)]), note="each byte is read and written")
        del other
        pageable = torch.zeros(size, dtype=torch.uint8)
        found.moved("pageable host -> HBM", size, copies(torch, [(there, pageable)]))
        del pageable
        if shutil.disk_usage(folder or tempfile.gettempdir()).free > 1.25 * size:
            with tempfile.TemporaryDirectory(dir=folder, prefix="gpu-check-") as place:
                path = Path(place) / "weights"
                write(path, size)
                found.moved(
                    "page cache -> pinned host -> HBM",
                    size,
                    timed(lambda p=path, t=there: stream(torch, p, t)),
                    note="two buffers in turn: a reload at its best",
                )
        else:
            found.skip(f"page cache -> pinned host -> HBM, {size / GB:g} GB", "the disk is too full for the file")
        del there, pinned
        torch.cuda.empty_cache()
        getattr(torch._C, "_host_emptyCache", int)()  # else pinned memory stays pinned
    together(found, sizes, torch)


def together(found: Findings, sizes: Sequence[int], torch: Any) -> None:
    """All GPUs of the host at once: what its memory gives them."""
    n = torch.cuda.device_count()
    what = "pinned host -> HBM, all GPUs together"
    if n < 2:
        found.skip(what, "there is one GPU")
        return
    size = min(sizes)
    pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(n)]
    there = [torch.empty(size, dtype=torch.uint8, device=f"cuda:{i}") for i in range(n)]
    found.moved(what, n * size, copies(torch, list(zip(there, pinned))), note=f"{n} GPUs")  # noqa: B905


def copies(torch: Any, pairs: Sequence[tuple[Any, Any]]) -> list[float]:
    """Seconds to copy every second of a pair into its first, all at the same time."""

    def move() -> None:
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        for i in range(torch.cuda.device_count()):
            torch.cuda.synchronize(i)

    return timed(move)


def stream(torch: Any, path: Path, target: Any) -> None:
    """A file into a tensor on the GPU, reading the next chunk while the last one is copied."""
    buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    done = [torch.cuda.Event() for _ in buffers]
    at, turn = 0, 0
    with path.open("rb", buffering=0) as f:
        while at < len(target):
            done[turn].synchronize()
            n = f.readinto(memoryview(buffers[turn].numpy())[: len(target) - at])
            if not n:
                raise OSError(f"{path} ended early")
            target[at : at + n].copy_(buffers[turn][:n], non_blocking=True)
            done[turn].record()
            at, turn = at + n, 1 - turn
    torch.cuda.synchronize()
