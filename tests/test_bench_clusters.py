"""Clusters at a distance, live and simulated: the bench of that, in small."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from maestro_agents.cli.bench import clusters
from maestro_agents.cli.bench.live_play import Call
from maestro_agents.core import Grant
from maestro_agents.errors import ConfigError
from maestro_agents.queue.embedded import find_server
from maestro_agents.simulator.score import quantile

DEPLOY = Path(__file__).parents[1] / "serving" / "deploy"
FLEET = DEPLOY / "fleet.emulated-3clusters.toml"


@pytest.fixture
def links() -> Iterator[clusters.Links]:
    with clusters.Links() as found:
        yield found


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.write(b"end")
    writer.close()


async def test_a_link_delays_both_ways_and_keeps_bytes_in_order(links: clusters.Links) -> None:
    """A round trip takes what was said and little more; what was written while others were on their way comes after them."""
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    async with server:
        port = await asyncio.to_thread(links.add, "far", server.sockets[0].getsockname()[1], 0.1)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began_s = time.perf_counter()
        writer.write(b"first ")
        assert await reader.readexactly(6) == b"first "
        assert 0.1 <= time.perf_counter() - began_s < 0.2
        said = bytes(range(256)) * 400
        for n in range(0, len(said), 1000):
            writer.write(said[n : n + 1000])
            await asyncio.sleep(0)
        writer.write_eof()
        assert await reader.read(-1) == said + b"end"
        writer.close()


async def test_a_cluster_that_is_cut_breaks_what_is_open_and_refuses_until_it_is_mended(links: clusters.Links) -> None:
    """An open connection ends, a new one is refused; afterwards the same port works again, and another cluster never stopped."""
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    async with server:
        at = server.sockets[0].getsockname()[1]
        lost, other = [await asyncio.to_thread(links.add, name, at, 0.001) for name in ("lost", "other")]
        talks = [await asyncio.open_connection("127.0.0.1", port) for port in (lost, other)]
        for reader, writer in talks:
            writer.write(b"a")
            assert await reader.readexactly(1) == b"a"
        await asyncio.to_thread(links.cut, "lost")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await talks[0][0].readexactly(1)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", lost)
        talks[1][1].write(b"b")
        assert await talks[1][0].readexactly(1) == b"b"
        await asyncio.to_thread(links.mend, "lost")
        reader, writer = await asyncio.open_connection("127.0.0.1", lost)
        writer.write(b"c")
        assert await reader.readexactly(1) == b"c"
        for _, open_writer in (*talks, (reader, writer)):
            open_writer.close()


async def test_a_link_whose_engine_is_gone_ends_the_connection(links: clusters.Links) -> None:
    """Nobody waits for ever on a proxy that finds no one behind it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        nobody = s.getsockname()[1]
    port = await asyncio.to_thread(links.add, "far", nobody, 0.001)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 5)
    writer.close()


def test_the_routing_table_means_what_was_predicted_and_counts_what_was_not() -> None:
    """Means are of grants that have all four parts; one of the fast path is a call without a prediction."""
    on = clusters.bed(FLEET, runs=3, seed=0)

    def call(n: int, engine: str, because: dict[str, float], *, fast: bool = False) -> Call:
        grant = Grant(
            stage_id=f"r{n}.0", engine_id=engine, token=n, epoch=1, kv_bytes=1, fast=fast, because=because
        )  # fmt: skip
        return Call(
            stage_id=f"r{n}.0", ready_at_s=0, granted_at_s=1, first_byte_at_s=2, ended_at_s=4, grant=grant, away_s=0.1
        )

    parts = dict.fromkeys(clusters.PARTS, 0.0)
    calls = [
        call(1, "near", {}, fast=True),
        call(2, "far", {**parts, "network_s": 0.08, "decode_s": 1.0}),
        call(3, "far", {**parts, "network_s": 0.08, "decode_s": 2.0}),
    ]
    near, region, far = clusters.routing_table(calls, on)
    assert (near["calls"], near["fast"], near["because"]) == (1, 1, None)
    assert (region["calls"], region["took_s"]) == (0, None)
    assert far["because"] == pytest.approx({**parts, "network_s": 0.08, "decode_s": 1.5})
    assert far["predicted_s"] == pytest.approx(1.58)
    assert far["took_s"] == 3


def test_a_fleet_that_the_bench_cannot_play_is_refused(tmp_path: Path) -> None:
    """GPUs shared by models are the business of another bench; what is asked for is said."""
    with pytest.raises(ConfigError, match=r"\[\[engine\]\] tables of one model"):
        clusters.bed(DEPLOY / "fleet.sim-3clusters.toml", runs=3, seed=0)


@pytest.mark.slow
@pytest.mark.skipif(find_server() is None, reason="no Redis server here")
@pytest.mark.timeout(240)
def test_a_play_ends_every_run_and_its_figures_can_be_recounted_from_its_events(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Live and simulated, and once more with a cluster lost on the way: none is lost, distances are measured, shares add up."""
    ended: list[None] = []
    on = clusters.bed(FLEET, runs=6, seed=0)
    found = json.loads(json.dumps(clusters.run(on, ["ours"], seed=0, outage=True, look=lambda: ended.append(None))))
    assert len(ended) == 12
    told, lost = found["policies"]["ours"], found["outage"]
    for each in (told, lost):
        checks = each["checks"]
        assert (checks["ended"], checks["failed"], checks["reserved_at_end"]) == (6, {}, {})
        for row in each["rows"]:
            runs = [r for r in each["runs"][row["played"]] if r[4]]
            took = sorted(r[5] - r[2] for r in runs)
            assert row["completion_p50_s"] == pytest.approx(quantile(took, 0.5), abs=0.01)
            assert row["slo"] == pytest.approx(sum(r[5] <= r[3] for r in runs) / len(runs))
            calls = each["calls"][row["played"]]
            assert len(calls) == found["workload"]["stages"]
            assert sum(row["shares"].values()) == pytest.approx(1)
            for cluster, share in row["shares"].items():
                assert share == pytest.approx(sum(c[1] == cluster for c in calls) / len(calls))
    assert lost["cluster"] == "far"
    for cluster, injected in (("near", 0.001), ("region", 0.02), ("far", 0.08)):
        assert injected <= told["measured_rtt_s"][cluster] < injected + 0.05
    clusters.show(found)
    assert "where ours went" in capsys.readouterr().out
