"""The fleets that the benches run on: emulated engines, or real vLLM on this machine's CPU cores."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from maestro_agents.cli.up import Stack
from maestro_agents.core import EngineSpec
from maestro_agents.errors import ConfigError
from maestro_agents.fleet import Fleet, Launch, load_fleet

MODEL: Final = "bench"
MODEL_PATH_ENV: Final = "MAESTRO_VLLM_MODEL"
"""Folder of the model that real vLLM engines of the benches serve (``serving/vllm_cpu/tiny_model.py`` makes one)."""

KV_BYTES: Final = 256 * 2**20


def emulated(
    *,
    engines: int = 2,
    profile: str = "cpu-tiny",
    slots: int = 4,
    max_num_seqs: int | None = None,
    args: tuple[str, ...] = (),
    policy: str = "ours",
    logs: Path | None = None,
    notice: Callable[[str], None] = lambda _line: None,
) -> Stack:
    """Emulated engines: every number from it carries the label ``emulated``."""
    names = [chr(ord("a") + i) for i in range(engines)]
    fleet = Fleet(
        engines=tuple(EngineSpec(engine_id=n, url="", model=MODEL, slots=slots) for n in names),
        launches={n: Launch(kind="emulator", profile=profile, args=(*args, *_seqs(max_num_seqs))) for n in names},
    )
    return Stack(fleet, policy=policy, logs=logs, notice=notice)


def real_vllm(
    *,
    engines: int = 2,
    slots: int = 4,
    max_num_seqs: int | None = None,
    policy: str = "ours",
    logs: Path | None = None,
    notice: Callable[[str], None] = lambda _line: None,
) -> Stack:
    """Real vLLM engines, one per CPU core, under one node agent (label ``CPU-protocol-verified``). Raises `ConfigError`."""
    folder = os.environ.get(MODEL_PATH_ENV, "")
    if not Path(folder, "config.json").is_file():
        raise ConfigError(
            f"{MODEL_PATH_ENV} must name the folder of a small model for vLLM: "
            "python serving/vllm_cpu/tiny_model.py DIR makes one (see docs/vllm-cpu.md)"
        )
    stack = Stack(Fleet(), policy=policy, logs=logs, notice=notice)
    stack.logs.mkdir(parents=True, exist_ok=True)
    file = stack.logs / "nodes.toml"
    args = json.dumps(list(_seqs(max_num_seqs)))
    file.write_text(
        f"""[[gpu]]
kind = "cpu"
count = {engines}
node = "bench"
cpu_core = 0
memory_gb = 3
models = ["{MODEL}"]

[[model]]
name = "{MODEL}"
slots = {slots}
max_model_len = 2048
[model.launch]
kind = "vllm"
model_path = {json.dumps(str(Path(folder).resolve()))}
kv_cache_memory_bytes = {KV_BYTES}
args = {args}
""",
        encoding="utf-8",
    )
    stack.fleet = load_fleet(file)
    return stack


def _seqs(max_num_seqs: int | None) -> tuple[str, ...]:
    """Fewer at once than Maestro grants; the last word on the command line counts."""
    return ("--max-num-seqs", str(max_num_seqs)) if max_num_seqs else ()


def label(kind: str) -> str:
    """What may be claimed from a stack of this kind."""
    return {"emulator": "emulated", "vllm": "CPU-protocol-verified"}[kind]


def stack(kind: str, **options: object) -> Stack:
    """``emulator`` or ``vllm``. Raises `ConfigError`."""
    if kind == "emulator":
        return emulated(**options)  # type: ignore[arg-type]
    if kind == "vllm":
        return real_vllm(**options)  # type: ignore[arg-type]
    raise ConfigError(f"--engine {kind!r}: emulator or vllm")
