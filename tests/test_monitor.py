"""`maestro top` and `maestro queue`: what is read, what is shown, what is changed."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import signal
from io import StringIO

import pytest
from rich.console import Console

from maestro_agents.cli import monitor, snapshot
from maestro_agents.core import EngineSpec, Grant, Observation, RunEnd, ServiceClass, Status, Ticket
from maestro_agents.errors import ConfigError, QueueUnavailable
from maestro_agents.nodes import EngineReport, NodeReport
from maestro_agents.queue.embedded import EmbeddedRedis
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.queue.redis import RedisQueue

ENGINES = tuple(
    EngineSpec(engine_id=f"engine-{i}", url=f"http://127.0.0.1:{i}/v1", model="m", slots=2, kv_bytes=2**30)
    for i in range(2)
)


def ticket(stage_id: str, *, pushed_at_s: float = 90.0, **changes: object) -> Ticket:
    """A stage of an interactive run of the support app."""
    return Ticket(stage_id=stage_id, client_id="c", model="m", role="support:draft", pushed_at_s=pushed_at_s).evolve(
        **changes
    )


async def busy_queue() -> MemoryQueue:
    """One stage runs, two wait, three runs have ended (one of them late), at 100 s."""
    queue = MemoryQueue()
    epoch = await queue.lead("s", ttl_s=1e6, now_s=0.0)
    assert epoch is not None
    await queue.publish(ENGINES, p99={}, epoch=epoch, valid_until_s=0.0)  # no fast path
    running = ticket("runs", pushed_at_s=80.0)
    for t in (running, ticket("waits", due_at_s=105.0), ticket("nobody", service_class=ServiceClass.BATCH)):
        await queue.push(t, engines=ENGINES, now_s=90.0)
    grant = Grant(stage_id="runs", engine_id="engine-0", token=0, epoch=epoch, kv_bytes=2**28)
    assert await queue.grant(grant, running, now_s=95.0) is not None
    for i, took_s in enumerate((4.0, 6.0, 50.0)):
        await queue.end_run(
            RunEnd(run_id=f"r{i}", workflow="w", outcome="done", started_at_s=0, ended_at_s=took_s, deadline_at_s=30)
        )
    return queue


async def ended_stage(queue: MemoryQueue, stage_id: str, wait_s: float) -> None:
    """Push, grant and finish one more stage that waited so long."""
    t = ticket(stage_id, pushed_at_s=50.0)
    await queue.push(t, engines=ENGINES, now_s=50.0)
    grant = Grant(stage_id=stage_id, engine_id="engine-1", token=0, epoch=1, kv_bytes=1)
    given = await queue.grant(grant, t, now_s=50.0 + wait_s)
    assert given is not None
    observation = Observation(
        stage_id=stage_id,
        run_id="r",
        workflow="w",
        role=t.role,
        node="draft",
        model="m",
        engine_id="engine-1",
        service_class=t.service_class,
        tenant="default",
        status=Status.DONE,
        pushed_at_s=50.0,
        granted_at_s=50.0 + wait_s,
        finished_at_s=60.0,
    )
    assert await queue.finish(observation, client_id=t.client_id, token=given.token, now_s=60.0)


def text_of(snapshot: snapshot.Snapshot, *, width: int, height: int) -> str:
    """What a terminal of this size shows."""
    out = StringIO()
    Console(file=out, width=width, height=height).print(monitor.render(snapshot, height=height))
    return out.getvalue()


async def test_a_snapshot_counts_what_waits_what_runs_and_what_is_reserved():
    """Depth, age, running and reservations are those of the queue."""
    seen = await snapshot.Watch(await busy_queue(), source="here", now_s=lambda: 100.0).snapshot()
    interactive, batch = seen.lines
    assert (interactive.waiting, interactive.oldest_s, interactive.running) == (1, 10.0, 1)
    assert (batch.waiting, batch.running) == (1, 0)
    assert seen.depth == {"m": 2}
    first, second = seen.engines
    assert (first.reserved_slots, first.reserved_kv_bytes, second.reserved_slots) == (1, 2**28, 0)


async def test_the_last_runs_are_counted_by_class_with_their_deadlines():
    """Two of three interactive runs met their deadline; no batch run ended, so there is no line for them."""
    (line,) = (await snapshot.Watch(await busy_queue(), source="here").snapshot()).runs
    assert (line.service_class, line.done, line.met, line.promised) == (ServiceClass.INTERACTIVE, 3, 2, 3)
    assert (line.p50_s, line.p95_s) == (6.0, 50.0)


async def test_waits_come_from_the_log_and_each_entry_is_read_once():
    """A second look adds only what happened since the first."""
    queue = await busy_queue()
    watch = snapshot.Watch(queue, source="here", now_s=lambda: 100.0)
    await ended_stage(queue, "one", 2.0)
    assert (await watch.snapshot()).lines[0].wait_p50_s == 2.0
    await ended_stage(queue, "two", 4.0)
    line = (await watch.snapshot()).lines[0]
    assert (line.wait_p50_s, line.wait_p95_s) == (2.0, 4.0)


async def test_a_queue_that_goes_away_is_named_and_comes_back(monkeypatch):
    """The last snapshot stays, with the trouble beside it, until the queue answers again."""
    queue = await busy_queue()
    watch = snapshot.Watch(queue, source="here", now_s=lambda: 100.0)
    healthy = await watch.snapshot()

    async def down(*_args: object) -> None:
        raise QueueUnavailable

    with monkeypatch.context() as patch:
        patch.setattr(queue, "incarnation", down)
        troubled = await watch.snapshot()
    assert troubled == dataclasses.replace(healthy, trouble="Redis does not answer, retrying")
    assert "Redis does not answer, retrying" in text_of(troubled, width=100, height=24)
    assert await watch.snapshot() == healthy


async def test_a_restarted_store_is_read_from_its_beginning(monkeypatch):
    """What the log of the old incarnation said is forgotten, so nothing is counted twice."""
    queue = await busy_queue()
    watch = snapshot.Watch(queue, source="here", now_s=lambda: 100.0)
    before = await watch.snapshot()

    async def another() -> str:
        return "another"

    monkeypatch.setattr(queue, "incarnation", another)
    assert (await watch.snapshot()).runs == before.runs


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60)])
async def test_the_picture_fits_the_terminal(width, height):
    """Nothing is wider or higher than the terminal, and the numbers are all there."""
    queue = await busy_queue()
    await ended_stage(queue, "one", 2.0)
    text = text_of(
        await snapshot.Watch(queue, source="redis://127.0.0.1:6379  pool default", now_s=lambda: 100.0).snapshot(),
        width=width,
        height=height,
    )
    rows = text.rstrip("\n").split("\n")
    assert len(rows) <= height
    assert max(map(len, rows)) <= width
    line = next(r for r in rows if r.startswith("m ") and "interactive" in r)
    assert line.split() == ["m", "interactive", "1", "10", "s", "1", "2.00", "s", "2.00", "s"]
    assert next(r for r in rows if r.startswith("engine-0")).split() == [
        "engine-0", "m", "1/2", "████░░░░", "25%", "1.0", "GiB", "-",
    ]  # fmt: skip
    assert "2/3 (67%)" in text


async def test_an_engine_that_ages_is_shown_with_the_evidence():
    """Which engine, by when its memory is full, how fast it grows and how surely; as text and as JSON."""
    queue = await busy_queue()
    words = "host memory grows 1.02 GiB an hour (972 MiB to 1.13 GiB; p < 0.001 over 5.9 h): full in 44.3 min at the earliest"
    engines = [
        EngineReport(spec=spec, gpu_id="g", tier="gpu", to="gpu", ageing=said, exhausted_at_s=at_s, rejuvenation=n)
        for spec, said, at_s, n in zip(ENGINES, ("", words), (0.0, 2_800.0), (0, 2), strict=True)
    ]
    await queue.report(NodeReport(node_id="n", engines=engines), now_s=100.0, ttl_s=60.0)
    seen = await snapshot.Watch(queue, source="here", now_s=lambda: 100.0).snapshot()
    rows = [row.rstrip() for row in text_of(seen, width=90, height=24).split("\n")]
    assert " engine-1 ages, full in 44.3 min at the earliest, restarted 2 times" in rows
    assert "   host memory grows 1.02 GiB an hour (972 MiB to 1.13 GiB; p < 0.001 over 5.9 h)" in rows
    assert not any("engine-0 ages" in row for row in rows)
    (line,) = seen.to_json()["ageing"]
    assert line == {"engine_id": "engine-1", "words": words, "exhausted_at_s": 2_800.0, "restarts": 2}


def test_many_ageing_engines_do_not_push_the_rest_off_the_screen():
    """The most pressing are shown, the others counted, within the terminal's height."""
    ageing = tuple(
        snapshot.AgeingLine(engine_id=f"e{i}", words="it grows: full soon", exhausted_at_s=float(i), restarts=0)
        for i in range(20)
    )
    engines = tuple(
        snapshot.EngineLine(
            engine_id=f"e{i}", model="m", slots=8, reserved_slots=8, kv_bytes=0, reserved_kv_bytes=0, draining=0
        )
        for i in range(40)
    )
    lines = tuple(
        snapshot.Line(
            model="m", service_class=c, waiting=0, oldest_s=0.0, running=0, wait_p50_s=math.nan, wait_p95_s=math.nan
        )
        for c in ServiceClass
    )
    seen = snapshot.Snapshot(at_s=0.0, source="here", depth={}, lines=lines, engines=engines, ageing=ageing)
    text = text_of(seen, width=80, height=24)
    assert len(text.rstrip("\n").split("\n")) <= 24
    assert f"{20 - monitor.SHOWN_AGEING} more engines age" in text


def test_what_does_not_fit_is_counted():
    """Twenty models on forty engines still fit 24 lines; the rest is named by number."""
    lines = tuple(
        snapshot.Line(
            model=f"model-{i}",
            service_class=c,
            waiting=0,
            oldest_s=0.0,
            running=0,
            wait_p50_s=math.nan,
            wait_p95_s=math.nan,
        )
        for i in range(20)
        for c in ServiceClass
    )
    engines = tuple(
        snapshot.EngineLine(
            engine_id=f"e{i}",
            model="m",
            slots=8,
            reserved_slots=8,
            kv_bytes=0,
            reserved_kv_bytes=0,
            draining=0,
        )
        for i in range(40)
    )
    seen = snapshot.Snapshot(at_s=0.0, source="here", depth={"m": 1_500}, lines=lines, engines=engines)
    text = text_of(seen, width=80, height=24)
    assert len(text.rstrip("\n").split("\n")) <= 24
    shown = sum(row.startswith("model-") for row in text.split("\n"))
    assert f"{40 - shown} more lines" in text
    assert "m: 1500" in text
    assert "more engines" in text


def test_a_queue_without_a_fleet_says_what_is_missing():
    """An empty pool is no empty screen."""
    assert "is a scheduler running?" in text_of(
        snapshot.Snapshot(at_s=0.0, source="here", depth={}), width=80, height=24
    )


async def test_json_is_plain_and_unknown_numbers_are_null():
    """The JSON parses strictly: no NaN, no Infinity."""
    seen = await snapshot.Watch(await busy_queue(), source="here", now_s=lambda: 100.0).snapshot()
    body = json.loads(json.dumps(seen.to_json(), allow_nan=False))
    assert body["lines"][0]["wait_p50_s"] is None
    assert body["engines"][0]["reserved_slots"] == 1


async def test_ls_names_running_stages_first_and_waiting_ones_as_they_are_due():
    """The order on the screen is the order of service."""
    held = await snapshot.entries(await busy_queue())
    assert [(e.ticket.stage_id, e.status) for e in held] == [
        ("runs", Status.GRANTED),
        ("nobody", Status.QUEUED),
        ("waits", Status.QUEUED),
    ]
    out = StringIO()
    Console(file=out, width=120).print(monitor.entries_table(held, now_s=100.0))
    assert "runs on engine-0" in out.getvalue()


async def test_the_beginning_of_an_id_names_a_stage_unless_it_names_several():
    """What the screen shows of an id can be typed; what is ambiguous is refused."""
    queue = await busy_queue()
    await queue.push(ticket("waits~1"), engines=ENGINES, now_s=90.0)
    await queue.push(ticket("waits~2"), engines=ENGINES, now_s=90.0)
    held = await snapshot.entries(queue)
    for typed, stage_id in (("nob", "nobody"), ("waits", "waits"), ("waits~2", "waits~2")):
        entry = snapshot.named(held, typed)
        assert entry is not None
        assert entry.ticket.stage_id == stage_id
    with pytest.raises(ConfigError, match="2 stages begin with 'waits~'"):
        snapshot.named(held, "waits~")


async def test_show_finds_a_stage_that_waits_that_runs_and_that_has_ended():
    """Whatever became of a stage, its numbers are shown; a deadline that nobody set is null."""
    queue = await busy_queue()
    await ended_stage(queue, "ended", 2.0)
    assert (await snapshot.find(queue, "waits"))["status"] == "queued"
    running = await snapshot.find(queue, "runs")
    assert (running["status"], running["engine_id"], running["deadline_at_s"]) == ("granted", "engine-0", None)
    assert (await snapshot.find(queue, "ended"))["status"] == "done"


async def test_show_of_an_unknown_stage_says_where_to_look():
    """A wrong id is the user's error, in one line."""
    with pytest.raises(ConfigError, match=r"no stage 'x'.*maestro queue ls"):
        await snapshot.find(await busy_queue(), "x")


async def test_cancel_refuses_a_waiting_stage_and_tells_its_caller():
    """It is gone from the queue, and the client's inbox says so: it need not find out by waiting."""
    queue = await busy_queue()
    await queue.verdicts("c", 0.0)
    assert await snapshot.cancel(queue, "wai", now_s=100.0) == "waits"
    assert queue.status("waits") is Status.REFUSED
    assert [v.stage_id for v in await queue.verdicts("c", 0.0)] == ["waits"]


@pytest.mark.parametrize(
    ("stage", "says"),
    [("runs", "runs on engine-0 already"), ("ended", "no stage 'ended' waits"), ("x", "no stage 'x'")],
)
async def test_cancel_of_anything_else_changes_nothing_and_says_why(stage, says):
    """A running call is its app's to end; what has ended or never was cannot be withdrawn."""
    queue = await busy_queue()
    await ended_stage(queue, "ended", 2.0)
    before = await snapshot.entries(queue)
    with pytest.raises(ConfigError, match=says):
        await snapshot.cancel(queue, stage, now_s=100.0)
    assert await snapshot.entries(queue) == before
    assert queue.status("ended") is Status.DONE


def test_percentile_is_the_nearest_rank():
    """Of twenty values the 95th percentile is the nineteenth; of none it is unknown."""
    assert snapshot.percentile(range(1, 21), 0.95) == 19
    assert snapshot.percentile((7.0,), 0.5) == 7.0
    assert math.isnan(snapshot.percentile((), 0.5))


async def test_top_outlives_a_redis_that_is_killed_and_started_again():
    """The same watch, over real Redis: trouble is shown while it is away, and gone when it is back."""
    with EmbeddedRedis() as redis:
        if redis.url is None or redis.pid is None:
            pytest.skip("no Redis server is here to start")
        queue = RedisQueue(redis.url)
        try:
            watch = snapshot.Watch(queue, source="here")
            assert (await watch.snapshot()).trouble == ""
            os.kill(redis.pid, signal.SIGKILL)
            while not (await watch.snapshot()).trouble:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(redis.restart)
            while (await watch.snapshot()).trouble:  # it pauses between tries
                await asyncio.sleep(0.01)
        finally:
            await queue.close()


def test_without_a_redis_url_the_commands_say_what_to_set(monkeypatch):
    """A queue inside another process cannot be seen from here."""
    monkeypatch.delenv("MAESTRO_REDIS_URL", raising=False)
    with pytest.raises(ConfigError, match=r"which Redis\? Set MAESTRO_REDIS_URL"):
        monitor.list_stages()


def test_one_look_at_a_redis_that_is_not_there_is_an_error():
    """`--once` is for scripts: it does not wait for better times."""
    with pytest.raises(QueueUnavailable):
        monitor.top(redis_url="redis://127.0.0.1:9/0", once=True)


def test_the_commands_speak_to_a_real_redis(capsys):
    """What another process pushed is listed, shown and withdrawn by its id."""
    with EmbeddedRedis() as redis:
        if redis.url is None:
            pytest.skip("no Redis server is here to start")

        async def push() -> None:
            queue = RedisQueue(redis.url or "")
            epoch = await queue.lead("s", ttl_s=60.0, now_s=0.0)
            assert epoch is not None
            await queue.publish(ENGINES, p99={}, epoch=epoch, valid_until_s=0.0)
            await queue.push(ticket("waits"), engines=ENGINES, now_s=90.0)
            await queue.close()

        asyncio.run(push())
        monitor.top(redis_url=redis.url, once=True, as_json=True)
        assert json.loads(capsys.readouterr().out)["depth"] == {"m": 1}
        monitor.list_stages(redis_url=redis.url, as_json=True)
        assert [e["stage_id"] for e in json.loads(capsys.readouterr().out)] == ["waits"]
        monitor.show_stage("wai", redis_url=redis.url)
        assert "support:draft" in capsys.readouterr().out
        monitor.cancel_stage("wai", redis_url=redis.url, yes=True)
        assert "waits is withdrawn" in capsys.readouterr().out
        monitor.list_stages(redis_url=redis.url)
        assert "empty" in capsys.readouterr().out
