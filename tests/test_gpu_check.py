"""`serving/gpu_check` on a machine without a GPU: it measures what is there and says what is not; its driver calls leave nothing."""

# ruff: noqa: N802 (the driver names its functions so)
from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maestro_agents.simulator.hardware import gpus, models

SCRIPT = Path(__file__).resolve().parent.parent / "serving" / "gpu_check"
VLLM = os.environ.get("MAESTRO_VLLM")
CUDA_H = next(
    (
        p
        for p in (Path("/usr/local/cuda/include/cuda.h"), *Path("/usr/local").glob("cuda-*/include/cuda.h"))
        if p.exists()
    ),
    None,
)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script's modules."""
    monkeypatch.syspath_prepend(str(SCRIPT))
    parts = ("findings", "moves", "vmm", "beside")
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in parts})
    finally:
        for name in parts:
            sys.modules.pop(name, None)


def quiet(check: Any) -> Any:
    """Findings that print nothing."""
    return check.findings.Findings(say=lambda _line: None)


def run(tmp_path: Path, *args: str, python: str = sys.executable, **env: str) -> tuple[str, dict[str, Any]]:
    """Run it as its user does; what it printed, and its JSON."""
    out = tmp_path / "out.json"
    argv = [python, str(SCRIPT), "--folder", str(tmp_path), "--json", str(out), *args]
    done = subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


# -- the script ----------------------------------------------------------------------------------------------------------
def test_without_torch_it_measures_the_host_and_names_what_is_missing(tmp_path: Path) -> None:
    """Disk and memory speeds are there; every move that needs a GPU is said not to be measured, with the cause."""
    stub = tmp_path / "stub" / "torch"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ImportError('no wheel here')")
    said, found = run(tmp_path, "--sizes-gb", "0.02", "--write-profile", PYTHONPATH=str(stub.parent))
    rates = {r["what"]: r["gb_per_s"] for r in found["results"]}
    assert {"host -> host", "host -> disk", "page cache -> host"} <= rates.keys()
    assert all(rate > 0 for rate in rates.values())
    missing = {m["what"]: m["why"] for m in found["not_measured"]}
    for what in ("pinned host -> HBM", "HBM -> pinned host", "two models side by side"):
        assert missing[what] == "PyTorch cannot be imported (ImportError: no wheel here)"
        assert f"{what} " in said
    assert "KV blocks of 2 MiB through CUDA VMM" in missing
    assert found["label"] == "no GPU: the host's part only"
    assert found["device"] is None
    assert found["wake_s"]["qwen3-8b"]["wake from sleep level 1"] is None
    assert found["wake_s"]["qwen3-8b"]["reload, files in the page cache"] == pytest.approx(
        16.38147072 / rates["page cache -> host"], rel=0.01
    )
    assert "# host_link_bytes_per_s: not measured" in said
    assert "host_bytes_per_s = " in said
    assert not list(tmp_path.glob("gpu-check-*"))


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM, reason="MAESTRO_VLLM is not set")
def test_with_torch_and_no_gpu_the_models_run_side_by_side_on_the_cpu(tmp_path: Path) -> None:
    """The same code as on a GPU, labelled: alone, in two threads, in two processes."""
    python = str(Path(VLLM or "").with_name("python"))
    _, found = run(tmp_path, "--sizes-gb", "0.01", "--seconds", "0.3", python=python)
    said = {r["what"]: r["value"] for r in found["results"] if "value" in r}
    for shape in ("decode", "prefill"):
        assert said[f"CPU: {shape} alone"] > 0
        assert said[f"CPU: {shape} beside another, two streams"] > 0
        assert said[f"CPU: {shape} beside another, two processes"] > 0
    missing = {m["what"]: m["why"] for m in found["not_measured"]}
    assert "sees no CUDA device" in missing["two models side by side on a GPU"]
    assert "sees no CUDA device" in missing["pinned host -> HBM"]


# -- its parts -----------------------------------------------------------------------------------------------------------
def test_a_size_that_does_not_fit_is_named(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither disk nor memory is filled up: the size is left out and said."""
    monkeypatch.setattr(check.moves, "free_memory", lambda: 10_000_000)
    found = quiet(check)
    check.moves.host_memory(found, [9_000_000])
    check.moves.disk(found, [9_000_000], tmp_path)
    assert found.results == []
    assert [m["what"] for m in found.not_measured] == [
        "host -> host, 0.009 GB",
        *(f"{way}, 0.009 GB" for way in ("host -> disk", "disk -> host", "page cache -> host")),
    ]
    assert all("are free" in m["why"] for m in found.not_measured)


def test_a_read_that_was_not_cold_is_not_called_one(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel keeps the file in memory, the disk's speed counts as not measured."""
    monkeypatch.setattr(check.moves, "forget", lambda path: 0.4)
    found = quiet(check)
    check.moves.disk(found, [3_000_000], tmp_path)
    assert "disk -> host" not in {r["what"] for r in found.results}
    assert [m["why"] for m in found.not_measured] == ["40% of the file stays in memory (tmpfs, or no fadvise)"]


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or not hasattr(os, "posix_fadvise"), reason="Linux")
def test_what_stays_in_memory_is_seen(check: Any, tmp_path: Path) -> None:
    """A file on a disk can be dropped from the page cache; one in memory cannot, and `mincore` says so."""
    there = Path("/dev/shm") / f"gpu-check-{os.getpid()}"
    try:
        check.moves.write(there, 4_000_000)
        assert check.moves.forget(there) == 1.0
    finally:
        there.unlink(missing_ok=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_all_of_a_file_is_read(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Whatever the size and however many threads share it, every byte is read once."""
    monkeypatch.setattr(check.moves, "CHUNK", 1000)
    path, ranges, preadv = tmp_path / "weights", [], os.preadv

    def seen(fd: int, buffers: list[memoryview], at: int) -> int:
        n = preadv(fd, buffers, at)
        ranges.append((at, n))
        return n

    assert check.moves.write(path, 12_345) > 0
    monkeypatch.setattr(os, "preadv", seen)
    check.moves.read(path, threads)
    ends = 0
    for at, n in sorted(ranges):
        assert at == ends
        ends = at + n
    assert ends == path.stat().st_size == 12_345


def test_the_profile_names_keys_that_the_simulator_has(check: Any) -> None:
    """The models' sizes and the GPUs' kinds are the simulator's, and an entry of a profile takes the place of one that is there."""
    assert {m: models()[m].parameters for m in check.findings.MODELS} == check.findings.MODELS
    assert set(check.findings.KINDS.values()) == set(gpus())
    found = quiet(check)
    found.device = {"name": "NVIDIA H200"}
    found.moved("pinned host -> HBM", 16 * 10**9, [0.4])
    found.moved("HBM -> pinned host", 16 * 10**9, [0.5, 0.5, 9.0])
    found.moved("pinned host -> HBM", 10**9, [1.0])
    profile = found.profile()
    assert "[gpu.h200-141g]\nhost_link_bytes_per_s = 3.2e+10\n# host_memory_bytes_per_s: not measured" in profile
    for key in ("host_link_bytes_per_s", "host_memory_bytes_per_s"):
        assert hasattr(gpus()["h200-141g"], key)
    tiers = (SCRIPT.parent.parent / "maestro_agents" / "simulator" / "profiles" / "tiers.toml").read_text()
    for key in ("host_bytes_per_s", "disk_bytes_per_s"):
        assert f"\n{key} = " in tiers
        assert f"# {key}: not measured" in profile
    assert found.wake_s()["llama-3.1-70b"]["wake from sleep level 1"] == pytest.approx(141.1 / 40, abs=0.01)


# -- the driver ----------------------------------------------------------------------------------------------------------
class FakeDriver:
    """The driver's memory calls with their rules: what is mapped is not released, what is reserved is not mapped twice."""

    def __init__(self, memory: int) -> None:
        self.free = self.total = memory
        self.handles: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.usable: set[int] = set()
        self.reserved: dict[int, int] = {}
        self.contexts = 0
        self.next = 0x1000000

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            return int(bool(getattr(self, f"do_{name}")(*(getattr(a, "_obj", a) for a in args)) or 0)) * 2

        return call

    def do_cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device.value = ordinal

    def do_cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> None:
        self.contexts += 1

    def do_cuDevicePrimaryCtxRelease_v2(self, device: Any) -> None:
        self.contexts -= 1

    def do_cuCtxSetCurrent(self, context: Any) -> None: ...

    def do_cuCtxSynchronize(self) -> None: ...

    def do_cuMemGetAllocationGranularity(self, size: Any, kind: Any, option: int) -> None:
        assert (kind.type, kind.location.type, option) == (1, 1, 0)
        size.value = 2 * 2**20

    def do_cuMemAddressReserve(self, at: Any, size: Any, *_: Any) -> None:
        at.value = self.next
        self.reserved[self.next] = size.value

    def do_cuMemAddressFree(self, at: Any, size: Any) -> None:
        assert not self.mapped
        assert self.reserved.pop(at.value) == size.value

    def do_cuMemCreate(self, handle: Any, size: Any, kind: Any, flags: Any) -> bool:
        if size.value > self.free:
            return True
        self.free -= size.value
        handle.value = len(self.handles) + 1 + self.total
        self.handles[handle.value] = size.value
        return False

    def do_cuMemMap(self, at: Any, size: Any, offset: Any, handle: Any, flags: Any) -> None:
        begin, length = next(iter(self.reserved.items()))
        assert begin <= at.value
        assert at.value + size.value <= begin + length
        assert at.value not in self.mapped
        self.mapped[at.value] = handle.value

    def do_cuMemSetAccess(self, at: Any, size: Any, access: Any, count: Any) -> None:
        assert at.value in self.mapped
        assert access.flags == 3
        self.usable.add(at.value)

    def do_cuMemsetD8_v2(self, at: Any, byte: Any, size: Any) -> None:
        assert self.usable == set(range(at.value, at.value + size.value, 2 * 2**20))

    def do_cuMemUnmap(self, at: Any, size: Any) -> None:
        del self.mapped[at.value]
        self.usable.discard(at.value)

    def do_cuMemRelease(self, handle: Any) -> None:
        assert handle.value not in self.mapped.values()
        self.free += self.handles.pop(handle.value)

    def do_cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        free.value, total.value = self.free, self.total


def nothing_left(driver: FakeDriver) -> bool:
    return (driver.free, driver.handles, driver.mapped, driver.reserved, driver.contexts) == (
        driver.total,
        {},
        {},
        {},
        0,
    )


def test_kv_blocks_are_given_used_and_taken_back(check: Any) -> None:
    """By the driver's rules; what the blocks took of the HBM comes back."""
    library, found = FakeDriver(2**30), quiet(check)
    check.vmm.blocks(found, check.vmm.Driver(library), count=64)
    said = {r["what"]: r.get("value", r.get("bytes")) for r in found.results}
    assert said["HBM taken by the blocks"] == said["HBM that came back"] == 128
    assert said["KV memory given"] == said["KV memory taken back"] == 64 * 2 * 2**20
    assert said["KV block: create"] > 0
    assert nothing_left(library)


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8_v2"])
def test_a_driver_that_fails_halfway_leaves_nothing_behind(check: Any, call: str) -> None:
    """Whichever call fails, blocks, mappings, addresses and the context are given back, and the cause is said."""
    library, found = FakeDriver(2**30), quiet(check)
    if call == "cuMemCreate":
        library.free = library.total = 11 * 2**20  # the sixth block does not fit
    else:
        calls, real = [0], getattr(library, f"do_{call}")

        def fails(*args: Any) -> bool:
            calls[0] += 1
            return calls[0] == (1 if call == "cuMemsetD8_v2" else 5) or bool(real(*args))

        setattr(library, f"do_{call}", fails)
    found.attempt(check.vmm.WHAT, lambda: check.vmm.blocks(found, check.vmm.Driver(library), count=64))
    assert [m["why"] for m in found.not_measured] == [f"DriverError: {call} failed with CUresult 2 (out of memory)"]
    assert nothing_left(library)


@pytest.mark.skipif(CUDA_H is None or shutil.which("gcc") is None, reason="cuda.h or a C compiler is missing")
def test_the_structures_and_constants_are_those_of_cuda_h(check: Any, tmp_path: Path) -> None:
    """Sizes, offsets and values as a C compiler sees them, and every function that is called is declared."""
    source = tmp_path / "abi.c"
    source.write_text(
        """
        #include <stddef.h>
        #include <stdio.h>
        #include <cuda.h>
        int main(void) {
            printf("%zu %zu %zu %zu %zu %zu %d %d %d %d %d %zu %zu %zu\\n", sizeof(CUmemAllocationProp),
                offsetof(CUmemAllocationProp, requestedHandleTypes), offsetof(CUmemAllocationProp, location),
                offsetof(CUmemAllocationProp, win32HandleMetaData), offsetof(CUmemAllocationProp, allocFlags),
                offsetof(CUmemAccessDesc, flags), CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE,
                CU_MEM_ACCESS_FLAGS_PROT_READWRITE, CU_MEM_ALLOC_GRANULARITY_MINIMUM, CUDA_ERROR_OUT_OF_MEMORY,
                sizeof(CUdeviceptr), sizeof(CUmemGenericAllocationHandle), sizeof(CUmemAccessDesc));
            return 0;
        }
        """
    )
    assert CUDA_H is not None
    subprocess.run(["gcc", f"-I{CUDA_H.parent}", str(source), "-o", str(tmp_path / "abi")], check=True)
    theirs = [
        int(x) for x in subprocess.run([tmp_path / "abi"], capture_output=True, text=True, check=True).stdout.split()
    ]
    p, a, v = check.vmm.Properties, check.vmm.Access, check.vmm
    assert theirs == [
        ctypes.sizeof(p), p.handle_types.offset, p.location.offset, p.win32.offset, p.flags.offset, a.flags.offset,
        v.PINNED, v.DEVICE, v.READ_WRITE, v.MINIMUM, 2,
        ctypes.sizeof(ctypes.c_ulonglong), ctypes.sizeof(ctypes.c_ulonglong), ctypes.sizeof(a),
    ]  # fmt: skip
    header = CUDA_H.read_text(errors="replace")
    for name in (n.removeprefix("do_") for n in dir(FakeDriver) if n.startswith("do_")):
        assert f"{name.removesuffix('_v2')}(" in header
