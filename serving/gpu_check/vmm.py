"""KV-sized blocks through CUDA's virtual memory management: what elastic KV memory costs, and that its HBM comes back.

By ctypes on the driver (``libcuda.so.1``), as `cuda.h` declares it; PyTorch is not needed.
"""

from __future__ import annotations

import ctypes
import time
from ctypes import byref, c_int, c_size_t, c_ubyte, c_ulonglong, c_ushort, c_void_p
from typing import Any

from findings import Findings

BLOCK = 2 * 2**20
"""The smallest physical allocation on current GPUs; kvcached uses pages of this size."""

BLOCKS = 512
WHAT = "KV blocks of 2 MiB through CUDA VMM"

PINNED, DEVICE, READ_WRITE, MINIMUM = 1, 1, 3, 0


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", c_int), ("id", c_int))


class _Flags(ctypes.Structure):
    _fields_ = (("compression", c_ubyte), ("rdma", c_ubyte), ("usage", c_ushort), ("reserved", c_ubyte * 4))


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("win32", c_void_p),
        ("flags", _Flags),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", c_int))


class DriverError(Exception):
    """A call of the driver failed."""


class Driver:
    """The driver's calls, which raise `DriverError` where they fail."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __call__(self, name: str, *args: object) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            raise DriverError(f"{name} failed with CUresult {code}" + (" (out of memory)" if code == 2 else ""))


def load() -> Driver:
    """Raises OSError where there is no driver, `DriverError` where it finds no GPU."""
    driver = Driver(ctypes.CDLL("libcuda.so.1"))
    driver("cuInit", 0)
    return driver


def blocks(found: Findings, driver: Driver, *, count: int = BLOCKS) -> None:
    """Give an address range physical blocks one by one, use them, and take them away. Leaves nothing behind, whatever fails."""
    device, context = c_int(), c_void_p()
    driver("cuDeviceGet", byref(device), 0)
    driver("cuDevicePrimaryCtxRetain", byref(context), device)
    try:
        driver("cuCtxSetCurrent", context)
        where = Location(DEVICE, device.value)
        kind = Properties(type=PINNED, location=where)
        least = c_size_t()
        driver("cuMemGetAllocationGranularity", byref(least), byref(kind), MINIMUM)
        found.value("smallest physical allocation", least.value / 2**20, "MiB")
        size = -(-BLOCK // least.value) * least.value
        _grow_and_shrink(found, driver, kind, Access(where, READ_WRITE), size, count)
    finally:
        driver("cuDevicePrimaryCtxRelease_v2", device)


def _grow_and_shrink(found: Findings, driver: Driver, kind: Properties, access: Access, size: int, count: int) -> None:
    base = c_ulonglong()
    driver("cuMemAddressReserve", byref(base), c_size_t(size * count), c_size_t(0), c_ulonglong(0), c_ulonglong(0))
    handles: list[c_ulonglong] = []
    mapped = 0
    try:
        before = _free(driver)
        began_s = time.perf_counter()
        for _ in range(count):
            handle = c_ulonglong()
            driver("cuMemCreate", byref(handle), c_size_t(size), byref(kind), c_ulonglong(0))
            handles.append(handle)
        created_s = time.perf_counter()
        for i, handle in enumerate(handles):
            at = c_ulonglong(base.value + i * size)
            driver("cuMemMap", at, c_size_t(size), c_size_t(0), handle, c_ulonglong(0))
            mapped += 1
            driver("cuMemSetAccess", at, c_size_t(size), byref(access), c_size_t(1))
        mapped_s = time.perf_counter()
        driver("cuMemsetD8_v2", base, c_ubyte(1), c_size_t(size * count))
        driver("cuCtxSynchronize")
        taken = before - _free(driver)
        again_s = time.perf_counter()
        while mapped:
            driver("cuMemUnmap", c_ulonglong(base.value + (mapped - 1) * size), c_size_t(size))
            mapped -= 1
        unmapped_s = time.perf_counter()
        while handles:
            driver("cuMemRelease", handles[-1])
            handles.pop()
        ended_s = time.perf_counter()
        back = taken - (before - _free(driver))
    finally:
        while mapped:
            driver("cuMemUnmap", c_ulonglong(base.value + (mapped - 1) * size), c_size_t(size))
            mapped -= 1
        for handle in handles:
            driver("cuMemRelease", handle)
        driver("cuMemAddressFree", base, c_size_t(size * count))
    for what, took_s in (
        ("KV block: create", created_s - began_s),
        ("KV block: map and give access", mapped_s - created_s),
        ("KV block: unmap", unmapped_s - again_s),
        ("KV block: release", ended_s - unmapped_s),
    ):
        found.value(what, took_s / count * 1e6, "us", note=f"mean of {count} blocks of {size / 2**20:g} MiB")
    found.moved("KV memory given", size * count, [mapped_s - began_s])
    found.moved("KV memory taken back", size * count, [ended_s - again_s])
    found.value("HBM taken by the blocks", taken / 2**20, "MiB", note=f"{size * count / 2**20:g} asked for")
    found.value("HBM that came back", back / 2**20, "MiB")


def _free(driver: Driver) -> int:
    free, total = c_size_t(), c_size_t()
    driver("cuMemGetInfo_v2", byref(free), byref(total))
    return free.value
