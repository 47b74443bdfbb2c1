"""The main path survives kill -9 of each of its parts: the bench that counts it twenty times, here once each."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

from maestro_agents.cli.bench import faults

NO_VLLM = not (shutil.which(os.environ.get("MAESTRO_VLLM") or "vllm") and os.environ.get("MAESTRO_VLLM_MODEL"))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", faults.KINDS)
def test_every_run_of_a_living_app_ends_and_no_reservation_is_left(kind: str) -> None:
    """Emulated engines, everything else real: decorator, gate, Redis, scheduler, processes, kill -9. How soon is for the bench."""
    rows: list[dict[str, Any]] = faults.run("emulator", (kind,), 1, 7, 0.3, None, lambda _row: None)
    (found,) = faults.summary(rows)
    assert found["kept"], list(rows[0].items())


@pytest.mark.vllm
@pytest.mark.skipif(NO_VLLM, reason="no vLLM: set MAESTRO_VLLM and MAESTRO_VLLM_MODEL (docs/vllm-cpu.md)")
@pytest.mark.timeout(900)
def test_two_real_vllm_engines_survive_five_kills() -> None:
    """The same with real vLLM under a node agent, whose death no call notices: tokens, priorities and connections are an engine's own."""
    rows: list[dict[str, Any]] = faults.run("vllm", faults.NODE_KINDS, 1, 7, 0.3, None, lambda _row: None)
    assert [(r["fault"], r["kept"]) for r in faults.summary(rows)] == [(k, True) for k in faults.NODE_KINDS], rows
