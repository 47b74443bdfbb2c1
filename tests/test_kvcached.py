"""The kvcached adapter, against a `kvctl` that behaves as the real one's source says. No GPU, no kvcached."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest

from maestro_agents.errors import EngineUnavailable
from maestro_serving.kvcached import KvCached

MB = 2**20

KVCTL = f"""#!{sys.executable}
import os, pathlib, struct, sys
folder, log = pathlib.Path(os.environ["FAKE_SHM"]), pathlib.Path(os.environ["FAKE_LOG"])
with log.open("a") as out:
    out.write(" ".join(sys.argv[1:]) + "\\n")
if any(name.startswith("KVCACHED_") or name == "ENABLE_KVCACHED" for name in os.environ):
    sys.exit("kvctl was started as an engine")
segment = folder / sys.argv[2]
if os.environ.get("FAKE_HANG"):
    import time
    time.sleep(600)
if not segment.exists():
    print(f"Error: IPC '{{sys.argv[2]}}' not found.")
    sys.exit(int(os.environ.get("FAKE_RC", "1")))
if sys.argv[1] == "delete":
    segment.unlink()
elif not os.environ.get("FAKE_DEAF"):
    _, used, ahead = struct.unpack("=3q", segment.read_bytes())
    if used > int(sys.argv[3]):
        print("No enough free space to decrease for the new kv_cache_limit")
    segment.write_bytes(struct.pack("=3q", int(sys.argv[3]), used, ahead))
"""


class Machine:
    """A folder of segments, and a kvctl beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder.parent / "kvctl.log"
        program = folder.parent / "kvctl"
        program.write_text(KVCTL)
        program.chmod(0o755)
        self.kvcached = KvCached(program=str(program), folder=folder)

    def segment(self, name: str, limit: int, used: int = 0, ahead: int = 0) -> None:
        """What an engine leaves in shared memory."""
        (self.folder / name).write_bytes(struct.pack("=3q", limit, used, ahead))

    def limit_of(self, name: str) -> int:
        return struct.unpack("=3q", (self.folder / name).read_bytes())[0]

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setenv("FAKE_SHM", str(folder))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "kvctl.log"))
    monkeypatch.setenv("ENABLE_KVCACHED", "true")
    monkeypatch.setenv("KVCACHED_IPC_NAME", "someone")
    return Machine(folder)


async def test_a_limit_is_written_by_kvctl_in_bytes(machine: Machine) -> None:
    """The engine's own name, no unit that could be rounded, and kvctl does not take itself for an engine."""
    machine.segment("maestro_llama-gpu0", 8 * 2**30)
    await machine.kvcached.limit("llama.gpu0", 512 * MB)
    assert machine.limit_of("maestro_llama-gpu0") == 512 * MB
    assert machine.calls() == ["limit maestro_llama-gpu0 536870912"]


async def test_a_limit_below_what_is_used_is_accepted_and_takes_nothing_away(machine: Machine) -> None:
    """kvcached says that there is not enough free space, and writes it anyway."""
    machine.segment("maestro_a", 8 * 2**30, used=300 * MB, ahead=20 * MB)
    await machine.kvcached.limit("a", 100 * MB)
    assert machine.limit_of("maestro_a") == 100 * MB
    assert machine.kvcached.used_bytes("a") == 320 * MB


async def test_groups_share_a_limit_as_they_did_at_first(machine: Machine) -> None:
    """A model with several kinds of attention has a segment for each; a second limit is split no differently."""
    machine.segment("maestro_a", 600 * MB, used=10 * MB)
    machine.segment("maestro_a_g1", 200 * MB, used=5 * MB)
    machine.segment("maestro_a_great", 1)
    for total in (400, 100, 800):
        await machine.kvcached.limit("a", total * MB)
        assert machine.limit_of("maestro_a") == total * MB * 3 // 4
        assert machine.limit_of("maestro_a_g1") == total * MB // 4
    assert machine.kvcached.used_bytes("a") == 15 * MB


async def test_an_engine_without_kvcached_is_found_out(machine: Machine) -> None:
    """Its vLLM came up without the plugin, which says nothing of it: no segment."""
    assert not machine.kvcached.runs("a")
    assert machine.kvcached.used_bytes("a") == -1
    with pytest.raises(EngineUnavailable, match="not up, or its vLLM runs without kvcached"):
        await machine.kvcached.limit("a", MB)
    assert machine.calls() == []


async def test_segments_of_another_layout_are_not_interpreted(machine: Machine) -> None:
    """They carry no version: what is not 24 bytes is not read."""
    (machine.folder / "maestro_a").write_bytes(b"\0" * 32)
    assert not machine.kvcached.runs("a")
    assert machine.kvcached.used_bytes("a") == -1


@pytest.mark.parametrize("fault", [{"FAKE_DEAF": "1"}, {"FAKE_HANG": "1"}])
async def test_a_limit_that_was_not_taken_is_an_error(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, fault: dict[str, str]
) -> None:
    """Whatever kvctl says, and however long it takes: what was written is read back."""
    for name, value in fault.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("maestro_serving.kvcached.TIMEOUT_S", 0.5)
    machine.segment("maestro_a", 8 * MB)
    with pytest.raises(EngineUnavailable, match="kvctl"):
        await machine.kvcached.limit("a", 4 * MB)


async def test_no_engine_is_limited_to_nothing(machine: Machine) -> None:
    """kvcached asserts that a limit is positive, and would end the engine."""
    machine.segment("maestro_a", 8 * MB)
    with pytest.raises(ValueError, match="limited to nothing"):
        await machine.kvcached.limit("a", 0)


async def test_what_an_ended_server_left_is_removed(machine: Machine) -> None:
    """Segments outlive their engine; a second time, and without a program, nothing happens."""
    machine.segment("maestro_a", 8 * MB)
    machine.segment("maestro_a_g1", 8 * MB)
    machine.segment("maestro_b", 8 * MB)
    await machine.kvcached.forget("a")
    await machine.kvcached.forget("a")
    assert sorted(p.name for p in machine.folder.iterdir()) == ["maestro_b"]
    await KvCached(program="/nowhere/kvctl", folder=machine.folder).forget("b")


def test_it_is_looked_for_beside_vllm_first(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin must be in vLLM's own environment; without either there is none."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/nowhere")
    monkeypatch.setenv("MAESTRO_VLLM", str(bin_folder / "vllm"))
    elsewhere = KvCached.find()
    assert elsewhere is not None
    assert elsewhere.program == str(tmp_path / "kvctl")
    for name in ("vllm", "kvctl"):
        (bin_folder / name).write_text("#!/bin/sh\n")
        (bin_folder / name).chmod(0o755)
    beside = KvCached.find()
    assert beside is not None
    assert beside.program == str(bin_folder / "kvctl")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("MAESTRO_VLLM")
    assert KvCached.find() is None


def test_the_environment_names_the_segment() -> None:
    """Explicit names only: what kvcached makes up itself differs between the processes of one server."""
    env = KvCached.env("qwen 3/8b.gpu-0")
    assert env["KVCACHED_IPC_NAME"] == KvCached.name("qwen 3/8b.gpu-0") == "maestro_qwen-3-8b-gpu-0"
    assert env["ENABLE_KVCACHED"] == "true"
    assert len(KvCached.name("x" * 100)) == 64
