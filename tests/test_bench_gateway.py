"""What the gateway costs and leaves behind: the bench of that, in small."""

from __future__ import annotations

import json
import random
import resource
from typing import Any

import pytest

from maestro_agents.cli.bench import gateway
from maestro_agents.errors import ConfigError
from maestro_agents.queue.embedded import find_server


def test_what_is_added_is_found_again_within_its_interval() -> None:
    """Three milliseconds more on every call show as three at the median, and the interval holds them."""
    rng = random.Random(1)
    direct = [5 + rng.expovariate(1.0) for _ in range(400)]
    added = gateway.compared(direct, [3 + 5 + rng.expovariate(1.0) for _ in range(400)])["added_ms"]
    low, high = added["p50"]["interval_ms"]
    assert low < 3 < high
    assert high - low < 1
    assert added["p50"]["ms"] == pytest.approx(3, abs=0.4)


def test_a_chunk_that_only_names_the_role_is_no_first_token() -> None:
    """Time to the first token counts to the first text of the answer."""

    def line(delta: dict[str, Any]) -> str:
        return "data: " + json.dumps({"choices": [{"delta": delta}]})

    assert not gateway.has_text(line({"role": "assistant", "content": ""}))
    assert gateway.has_text(line({"content": "word"}))
    assert not any(map(gateway.has_text, ("", "data: [DONE]", 'data: {"choices": []}')))


def test_a_result_that_differs_or_a_stream_that_does_not_end_is_a_loss() -> None:
    """Which is what the command's exit code says."""

    def found(gated: int, both: int, completed: int) -> dict[str, Any]:
        alike = {"runs": 3, "as_direct": {"gateway": gated, "decorator": 3}, "decorator_as_gateway": both}
        return {"same": alike, "streams": {"waves": [{"completed": completed, "streams": 9}]}}

    assert not gateway.lost(found(3, 3, 9))
    assert gateway.lost(found(2, 3, 9))
    assert gateway.lost(found(3, 2, 9))
    assert gateway.lost(found(3, 3, 8))


def test_more_files_than_the_shell_allows_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft limit is raised as far as the hard one lets it, and no farther."""
    limits = (64, 100)
    seen: list[tuple[int, int]] = []

    def raised(_which: int, to: tuple[int, int]) -> None:
        seen.append(to)

    def known(_which: int) -> tuple[int, int]:
        return limits

    monkeypatch.setattr(resource, "getrlimit", known)
    monkeypatch.setattr(resource, "setrlimit", raised)
    assert gateway.allow_files(50) == 64
    assert gateway.allow_files(90) == 90
    assert seen == [(90, 100)]
    with pytest.raises(ConfigError, match="ulimit -Hn"):
        gateway.allow_files(101)


@pytest.mark.slow
@pytest.mark.skipif(find_server() is None, reason="no Redis server here")
@pytest.mark.timeout(240)
def test_results_are_alike_every_stream_ends_and_each_wave_tells_what_it_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Real gateway, Redis and emulated engines: all of the bench with few calls."""
    looks: list[None] = []
    found = json.loads(json.dumps(gateway.run(streams=20, count=2, pairs=20, runs=1, look=lambda: looks.append(None))))
    assert not gateway.lost(found)
    assert len(looks) == 2 * (20 + gateway.WARM) + 2 * 20
    assert found["latency"]["whole"]["gateway_ms"]["p50"] > found["latency"]["whole"]["direct_ms"]["p50"]
    first, second = found["streams"]["waves"]
    assert first["failed"] == second["failed"] == {}
    assert second["open_at_most"] == 20
    assert second["peak"]["files"] >= found["streams"]["idle"]["files"] + 20
    assert second["after"]["files"] < second["peak"]["files"] - 20
    gateway.show(found)
    assert "20 streams at once" in capsys.readouterr().out
