"""Redis as operators run it: which one a URL names, TLS, users, Sentinel, Cluster, on disk, away, and moved.

The queue's whole contract runs on each of them in test_queue.py; here is what is particular to each. Real servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot
from typer.testing import CliRunner

from maestro_agents.cli import build_app, doctor
from maestro_agents.core import Grant, Observation, Switch
from maestro_agents.errors import ConfigError, MaestroError, QueueUnavailable
from maestro_agents.fleet import load_fleet
from maestro_agents.queue import redis as redis_module
from maestro_agents.queue.embedded import EmbeddedRedis
from maestro_agents.queue.redis import RedisQueue, reach
from maestro_agents.redis_url import RedisUrl, without_password
from maestro_agents.settings import Settings
from tests import redis_servers as servers
from tests.queues import grant_users
from tests.redis_servers import Server
from tests.test_client import engine, joined, scheduler, until
from tests.test_queue import A, led, ticket


@pytest.fixture
def home() -> Iterator[Path]:
    with servers.folder() as folder:
        yield folder


@contextlib.asynccontextmanager
async def queue_at(url: str, pool: str = "default") -> AsyncIterator[RedisQueue]:
    queue = RedisQueue(url, pool=pool)
    try:
        yield queue
    finally:
        await queue.close()


def maestro(*words: str) -> Any:
    """A command, as typed; its output, and its one line of error where it fails."""
    return CliRunner().invoke(build_app([words[0]]), list(words))


# -- which Redis ---------------------------------------------------------------------------------------------------------
def test_each_kind_of_redis_has_a_url() -> None:
    """One server, a socket, a master behind Sentinels, a cluster: hosts, user, database and options are read from one text."""
    one = RedisUrl.parse("rediss://me:a%40b@h/2?ssl_ca_certs=/ca.pem")
    assert (one.kind, one.tls, one.hosts, one.db, one.username, one.password) == ("single", True, (("h", 6379),), 2, "me", "a@b")  # fmt: skip
    assert one.options == {"ssl_ca_certs": "/ca.pem"}
    socket = RedisUrl.parse("unix://:pw@/run/redis.sock?db=3")
    assert (socket.kind, socket.path, socket.db, socket.password) == ("unix", "/run/redis.sock", 3, "pw")
    watched = RedisUrl.parse("redis+sentinel://u:p@h1,h2:1,[::1]:2/mymaster/4?sentinel_password=s")
    assert watched.hosts == (("h1", 26379), ("h2", 1), ("::1", 2))
    assert (watched.kind, watched.master, watched.db, watched.options) == ("sentinel", "mymaster", 4, {"sentinel_password": "s"})  # fmt: skip
    cluster = RedisUrl.parse("rediss+cluster://h1:7000,h2:7001")
    assert (cluster.kind, cluster.tls, cluster.hosts) == ("cluster", True, (("h1", 7000), ("h2", 7001)))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://h", "starts with redis://"),
        ("redis://", "needs a host"),
        ("redis://h:1a", "the port"),
        ("redis://h:70000", "the port"),
        ("redis://h/x", "is a number, not 'x'"),
        ("redis://h1,h2", "redis+sentinel:// or redis+cluster://"),
        ("redis+sentinel://h1,h2", "names the master"),
        ("redis+cluster://h/1", "database 0 only"),
        ("unix://host", "needs the path of the socket"),
        ("redis://h?ssl_ca_certs=/x", "start the URL with rediss://"),
        ("redis+cluster://h?ssl_cert_reqs=none", "start the URL with rediss+cluster://"),
        ("redis://h?sentinel_password=x", "redis+sentinel://"),
        ("redis://h?timeoutt=3", "no option 'timeoutt'"),
        ("redis://:a/secret@h:1", "percent-encoded"),
    ],
)
def test_a_wrong_url_is_one_line_that_says_what_to_do(url: str, problem: str, tmp_path: Path) -> None:
    """In settings, in a fleet file and on the command line alike, and no password is in it."""
    with pytest.raises(ConfigError, match="redis_url = ") as told:
        Settings.load(redis_url=url)
    assert problem in str(told.value)
    path = tmp_path / "fleet.toml"
    path.write_text(f"[redis]\nurl = {json.dumps(url)}\n")
    with pytest.raises(ConfigError) as in_file:
        load_fleet(path)
    assert problem in str(in_file.value)
    with pytest.raises(ConfigError) as direct:
        RedisQueue(url)
    assert problem in str(direct.value)
    for error in (told, in_file, direct):
        assert "secret" not in str(error.value)


def test_a_url_is_shown_without_its_passwords() -> None:
    """Those of Redis and of Sentinels, wherever in the URL they stand, also where it is no good URL."""
    assert without_password("rediss://u:p@h:1/2") == "rediss://***@h:1/2"
    assert without_password("redis://h:1/2") == "redis://h:1/2"
    assert without_password("redis+sentinel://:s3@a,b/m?sentinel_password=s3&db=1") == "redis+sentinel://***@a,b/m?sentinel_password=***&db=1"  # fmt: skip
    assert "s3" not in without_password("unix:///run/x?password=s3&db=1")
    assert "s3" not in without_password("redis://:a/s3@h:1")


# -- TLS -----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def tls_ways(
    request: pytest.FixtureRequest, certificates: servers.Certificates, tls_url: str, home: Path
) -> Iterator[str]:
    """Redis that speaks TLS itself, or what stands in front of one that does not."""
    if request.param == "terminator":
        yield tls_url
        return
    server = servers.tls_server(home, certificates)
    yield f"rediss://127.0.0.1:{server.port}/0?{certificates.query}"
    server.stop()


@pytest.mark.parametrize("tls_ways", ["terminator", "redis"], indirect=True)
async def test_over_tls_both_sides_are_who_they_say(
    tls_ways: str, certificates: servers.Certificates, pool: str
) -> None:
    """By CA and client certificate from the URL; without one, or with another CA, nothing is said but one clear line."""
    async with queue_at(tls_ways, pool) as queue:
        await led(queue, credit=True)
        assert isinstance(await queue.push(ticket("s"), engines=(A,), now_s=1_790_000_000.0), Grant)
    assert reach(tls_ways).version
    assert doctor.check_redis(tls_ways)[0].status in ("ok", "note")
    bare = tls_ways.partition("?")[0]
    for wrong in (bare, f"{bare}?ssl_ca_certs={certificates.ca_file}", bare.replace("rediss", "redis")):
        with pytest.raises(QueueUnavailable, match=r"Redis at \S+ does not answer: "):
            reach(wrong)
        (found,) = doctor.check_redis(wrong)
        assert found.status == "broken"


# -- users ---------------------------------------------------------------------------------------------------------------
REFUSED = {
    "client": ("FLUSHALL", "CONFIG GET *", "KEYS *", "SCRIPT FLUSH", "SET {p}fleet x", "HSET {p}models kept x", "GET {p}api_keys", "DEL {p}log", "SET other x"),
    "scheduler": ("FLUSHALL", "GET {p}salt", "HGETALL {p}api_keys", "SET {p}switch off", "KEYS *"),
    "node": ("FLUSHALL", "SET {p}epoch 9", "HSET {p}leader holder me", "GET {p}salt", "XADD {p}wanted:n * w x", "ZRANGE {p}leases 0 -1"),
    "gateway": ("HSET {p}api_keys d x", "SET {p}fleet x", "KEYS *"),
    "monitor": ("SET {p}switch off", "GET {p}salt", "HGETALL {p}api_keys", "EVALSHA abc 0", "LPOP {p}inbox:c", "FLUSHALL"),
    "operator": ("FLUSHALL", "CONFIG GET *", "SET {p}fleet x", "ACL LIST"),
}  # fmt: skip


@pytest.mark.parametrize("role", REFUSED)
async def test_a_role_may_do_what_it_needs_and_no_more(role: str, redis_7: Server, pool: str) -> None:
    """What another role does, and what harms everybody, is refused by Redis itself."""
    prefix = f"maestro:{{{pool}}}:"
    async with queue_at(grant_users(redis_7, pool)[role], pool) as queue:
        assert await queue.server_time_s() > 0
        for text in REFUSED[role]:
            with pytest.raises(QueueUnavailable, match="maestro redis acl"):
                async with queue._reachable():
                    await queue._redis.execute_command(*text.replace("{p}", prefix).split())


async def test_a_role_cannot_run_the_scripts_of_another(redis_7: Server, pool: str) -> None:
    """An app publishes no fleet, a node grants nothing, a monitor pushes nothing, and is told whose word that is."""
    urls = grant_users(redis_7, pool)
    async with queue_at(urls["scheduler"], pool) as leads:
        epoch = await led(leads, credit=False)
    async with queue_at(urls["client"], pool) as client:
        await client.push(ticket("s"), engines=(A,), now_s=1_790_000_000.0)
        with pytest.raises(QueueUnavailable, match="This Redis user may not do that"):
            await client.publish((A,), p99={}, epoch=epoch, valid_until_s=2e9)
    wish = Grant(stage_id="s", engine_id="a", token=0, epoch=epoch, kv_bytes=1)
    async with queue_at(urls["node"], pool) as node:
        with pytest.raises(QueueUnavailable, match="This Redis user may not do that"):
            await node.grant(wish, ticket("s"), now_s=1_790_000_000.0)
    async with queue_at(urls["monitor"], pool) as monitor:
        with pytest.raises(QueueUnavailable, match="This Redis user may not do that"):
            await monitor.push(ticket("t"), engines=(A,), now_s=1_790_000_000.0)
        with pytest.raises(QueueUnavailable, match="This Redis user may not do that"):
            await monitor.set_switch(Switch())
        assert await monitor.depth("m") == 1


async def test_an_app_and_its_scheduler_work_as_their_users(
    redis_7: Server, pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Fast path, queue, requeue, end; the commands that look work as monitor, those that act as operator."""
    caplog.set_level(logging.WARNING, logger="maestro")
    urls = grant_users(redis_7, pool)
    async with scheduler(urls["scheduler"], pool, engine("e1")), joined(urls["client"], pool) as a:
        p = await a.granted("p")
        waits, task = a.waiter("waits")
        await until(lambda: waits.queued)

        def look(*words: str, role: str = "monitor") -> Any:
            return maestro(*words, "--redis-url", urls[role], "--pool", pool)

        for words in (("top", "--once"), ("top", "--json", "--once"), ("queue", "ls"), ("queue", "ls", "--json"), ("switch",)):  # fmt: skip
            ran = await asyncio.to_thread(look, *words)
            assert (ran.exit_code, ran.exception) == (0, None), (words, ran.output)
        settings = Settings.load(redis_url=urls["monitor"], pool=pool)
        for check in (doctor.check_redis, doctor.check_switch, functools.partial(doctor.check_fleet, None)):
            found = await asyncio.to_thread(check, urls["monitor"] if check is doctor.check_redis else settings)  # type: ignore[arg-type]
            findings = found[1] if isinstance(found, tuple) else found
            assert all(f.status in ("ok", "note") for f in findings), findings
        refused = await asyncio.to_thread(look, "switch", "off")
        assert isinstance(refused.exception, MaestroError)
        assert "may not do that" in str(refused.exception)
        turned = await asyncio.to_thread(functools.partial(look, "switch", "observe", role="operator"))
        assert turned.exit_code == 0, turned.output
        await asyncio.wait_for(task, 10)
        back = await asyncio.to_thread(functools.partial(look, "switch", "on", role="operator"))
        assert back.exit_code == 0
        p.finish()
        waits.finish()
        await until(lambda: a.room.mode.value == "on")
        q = await a.granted("q")
        assert q.requeue(engine_down=False)
        await q.wait_async()
        q.finish()
        await until(lambda: not a.room.held and not a.room.unsent)
    assert not [r for r in caplog.records if "may not" in r.getMessage() or r.levelno >= logging.ERROR]


def test_the_command_prints_users_that_redis_takes(
    redis_7: Server, home: Path, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As commands and as a file; a password is a hash where its variable is named, else a gap that says so."""
    monkeypatch.setenv("CLIENT_PW", "s3cret")
    ran = maestro("redis", "acl", "--pool", pool, "--password", "client=CLIENT_PW")
    lines = [x for x in ran.stdout.splitlines() if not x.startswith("#")]
    assert ran.exit_code == 0
    assert len(lines) == 6
    assert "s3cret" not in ran.stdout
    assert lines[1].split()[5] == ">PUT-A-PASSWORD-FOR-GATEWAY-HERE"
    for text in lines:
        assert redis_7.say(*text.split()) in (True, b"OK", "OK")
    assert reach(f"redis://maestro-{pool}-client:s3cret@127.0.0.1:{redis_7.port}/0").version
    (home / "users.acl").write_text(maestro("redis", "acl", "--pool", pool, "--password", "client=CLIENT_PW", "--aclfile").stdout.replace("#", "#"))  # fmt: skip
    kept = "\n".join(x for x in (home / "users.acl").read_text().splitlines() if not x.startswith("# "))
    (home / "users.acl").write_text(kept + "\n")
    with servers.running(Server(home, "--aclfile", str(home / "users.acl"))) as server:
        assert reach(f"redis://maestro-{pool}-client:s3cret@127.0.0.1:{server.port}/0").version
    wrong = maestro("redis", "acl", "--role", "emperor")
    assert "known are client" in str(wrong.exception)
    unset = maestro("redis", "acl", "--password", "client=NOT_SET")
    assert "is not set" in str(unset.exception)


def test_a_wrong_password_is_told_as_what_it_is(redis_7: Server, pool: str) -> None:
    """One line, without the password."""
    urls = grant_users(redis_7, pool)
    with pytest.raises(QueueUnavailable, match="lets nobody in by this user and password") as told:
        reach(urls["client"].replace("pw-client", "hunter2"))
    assert "hunter2" not in str(told.value)


# -- Sentinel ------------------------------------------------------------------------------------------------------------
async def replicated(sentinels: servers.Sentinels) -> None:
    """The replica has all that the master has."""

    def synced() -> bool:
        master, replica = (s.say("INFO", "replication", **sentinels.who) for s in (sentinels.master, other(sentinels)))
        return master["master_repl_offset"] == replica["slave_repl_offset"] and replica["master_link_status"] == "up"  # type: ignore[index]

    await asyncio.to_thread(servers.until, synced, "a replica that has it all")


def other(sentinels: servers.Sentinels) -> Server:
    return next(s for s in sentinels.servers if s is not sentinels.master)


async def test_a_killed_master_costs_a_pause_and_no_stage(
    home: Path, pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    """kill -9: the queue finds the new master, the epoch is raised, who waits and who holds are known, each granted once."""
    caplog.set_level(logging.WARNING)
    with servers.running(servers.Sentinels(home, password="s3cret")) as sentinels:
        url = sentinels.url
        async with scheduler(url, pool, engine("e1")) as leads, joined(url, pool, outage_after_s=60) as a:
            held = await a.granted("held")
            waits, task = a.waiter("waits")
            await until(lambda: waits.queued)
            await replicated(sentinels)
            old, epoch = sentinels.master, leads.epoch
            assert held.grant
            old.kill()
            late, late_task = a.waiter("late")  # pushed while nobody leads
            await until(lambda: leads.epoch > epoch and leads.leading, 30)
            assert sentinels.master is not old
            assert (await until_ledger(a)) == {"e1": 1}
            assert not task.done()
            held.finish()
            first, _ = await asyncio.wait((task, late_task), return_when=asyncio.FIRST_COMPLETED, timeout=20)
            assert len(first) == 1
            (waits if task in first else late).finish()
            await asyncio.wait_for(asyncio.gather(task, late_task), 20)
            (late if task in first else waits).finish()
            await a.quiet()
            seen = [o.stage_id.partition("~")[0] for o in await a.observations() if isinstance(o, Observation)]
            assert sorted(seen) == ["held", "late", "waits"]
            # the old master comes back and takes itself for one, until Sentinel makes it a replica: it is not asked
            epoch = leads.epoch
            old.start(wait=False)
            await asyncio.to_thread(servers.until, lambda: old.say("ROLE", **sentinels.who), "an old master")
            again = await a.granted("again")
            again.finish()
            await a.quiet()
            assert leads.epoch == epoch
    assert "s3cret" not in caplog.text
    assert "restarted" in caplog.text


async def until_ledger(a: Any) -> dict[str, int]:
    """What is reserved, once the queue answers and the room has told it all."""
    found: dict[str, int] = {}

    async def known() -> bool:
        nonlocal found
        with contextlib.suppress(QueueUnavailable):
            found = await a.ledger()
            return bool(found)
        return False

    await until(known)
    return found


async def test_a_grant_that_the_new_master_never_heard_of_is_not_given_twice(home: Path, pool: str) -> None:
    """Replication lags behind: the replica knows the stage as waiting. Its client holds the grant, says so, and keeps it alone."""
    with servers.running(servers.Sentinels(home, sentinels=1)) as sentinels:
        url = sentinels.url
        async with scheduler(url, pool, engine("e1")) as leads, joined(url, pool, outage_after_s=60) as a:
            holder = await a.granted("holder")
            p, task = a.waiter("p")
            await until(lambda: p.queued)
            await replicated(sentinels)
            replica, epoch = other(sentinels), leads.epoch
            replica.pause()  # what comes now is lost
            holder.finish()
            await asyncio.wait_for(task, 10)
            assert p.grant
            token = p.grant.token
            sentinels.master.kill()
            replica.go_on()
            await until(lambda: leads.epoch > epoch and leads.leading, 30)

            async def announced() -> bool:
                with contextlib.suppress(QueueUnavailable):
                    return [(r.ticket.stage_id, r.token) for r in await a.ask(a.room.queue.running()) if r.ticket.stage_id == "p"] == [("p", token)]  # fmt: skip
                return False

            await until(announced)
            assert await a.depth() == 0
            p.finish()
            q = await a.granted("q")
            assert q.grant
            assert q.grant.token > token + 1000
            q.finish()
            await until(lambda: not a.room.unsent)
            seen = [o.stage_id for o in await a.observations() if isinstance(o, Observation)]
            assert seen.count("p") == 1


async def test_a_master_that_was_made_a_replica_is_an_outage_and_then_left(home: Path, pool: str) -> None:
    """READONLY is told as "not ready", and the next command asks Sentinel again."""
    with servers.running(servers.Sentinels(home, sentinels=1)) as sentinels:
        async with queue_at(sentinels.url, pool) as queue:
            await led(queue, credit=False)
            before = await queue.incarnation()
            await replicated(sentinels)
            old = sentinels.master
            failover = functools.partial(sentinels.sentinels[0].say, "SENTINEL", "FAILOVER", "mymaster")
            await asyncio.to_thread(servers.until, failover, "a replica that Sentinel has looked at")
            await asyncio.to_thread(servers.until, lambda: sentinels.master is not old, "another master")
            old.say("REPLICAOF", "127.0.0.1", sentinels.master.port)  # Sentinel would break our connections: keep them
            tries = {0}

            async def writes() -> bool:
                try:
                    await queue.push(ticket("s"), engines=(A,), now_s=1_790_000_000.0)
                except QueueUnavailable:
                    tries.add(queue._failures)
                    return False
                return True

            await until(writes)
            assert max(tries) == 1
            assert sentinels.master.say("EXISTS", f"maestro:{{{pool}}}:stage:s")
            assert await queue.incarnation() != before, "a planned failover counts as a restart too"


async def test_the_pool_is_not_asked_of_a_replica(home: Path, pool: str) -> None:
    """A URL that names one server that is a replica: each write says that it is not ready, in one line."""
    with servers.running(Server(home / "a")) as master, servers.running(Server(home / "b")) as replica:
        replica.say("REPLICAOF", "127.0.0.1", master.port)
        async with queue_at(replica.url, pool) as queue:
            for _ in range(2):
                with pytest.raises(QueueUnavailable, match="Redis is not ready"):
                    await queue.push(ticket("s"), engines=(A,), now_s=1_790_000_000.0)
            replica.say("REPLICAOF", "NO", "ONE")
            assert await queue.push(ticket("s"), engines=(A,), now_s=1_790_000_000.0) is None


# -- Cluster -------------------------------------------------------------------------------------------------------------
async def test_two_pools_live_on_different_nodes_of_a_cluster(redis_cluster: servers.Cluster) -> None:
    """Each with all its keys on one node, and each on its own: app and scheduler work through any node's name."""
    pools = ["one", next(p for p in map(str, range(99)) if key_slot(f"{{{p}}}".encode()[1:-1]) // 5462 != key_slot(b"one") // 5462)]  # fmt: skip
    for pool in pools:
        async with scheduler(redis_cluster.url, pool, engine("e1")), joined(redis_cluster.url, pool) as a:
            p = await a.granted()
            q, task = a.waiter()
            await until(lambda q=q: q.queued)
            p.finish()
            await asyncio.wait_for(task, 10)
            q.finish()
            await a.quiet()
    homes = {pool: [s.port for s in redis_cluster.servers if s.say("KEYS", f"maestro:{{{pool}}}:*")] for pool in pools}
    assert all(len(found) == 1 for found in homes.values())
    assert homes[pools[0]] != homes[pools[1]]
    assert "of 3" in reach(redis_cluster.url).role


async def test_a_slot_that_moved_is_followed(redis_cluster: servers.Cluster, pool: str) -> None:
    """Pipelines of scripts and blocking reads go to the new node; it counts as a restart; nothing is lost."""
    async with queue_at(redis_cluster.url, pool) as queue:
        await led(queue, credit=False)
        await queue.push(ticket("before"), engines=(A,), now_s=1_790_000_000.0)
        was = await queue.incarnation()
        slot = key_slot(pool.encode())
        of = next(s for s in redis_cluster.servers if s.say("CLUSTER", "COUNTKEYSINSLOT", slot))
        to = next(s for s in redis_cluster.servers if s is not of)
        await asyncio.to_thread(redis_cluster.move_slot, slot, to=to)
        said = await asyncio.gather(
            *(queue.push(ticket(f"s{i}"), engines=(A,), now_s=1_790_000_000.0) for i in range(3)), queue.wake(0.5)
        )
        assert said == [None] * 4
        assert await queue.depth("m") == 4
        assert to.say("EXISTS", f"maestro:{{{pool}}}:stage:s0")
        assert await queue.incarnation() != was


# -- on disk, or not -----------------------------------------------------------------------------------------------------
async def test_with_an_append_only_file_a_killed_redis_forgets_nothing_of_a_second_ago(home: Path, pool: str) -> None:
    """The settings that docs/redis.md recommends: what waits, what is held and the log are there again, and runs go on."""
    options = ("--appendonly", "yes", "--appendfsync", "everysec")
    with servers.running(Server(home, *options)) as server:
        async with scheduler(server.url, pool, engine("e1")) as leads, joined(server.url, pool, outage_after_s=60) as a:
            first = await a.granted("first")
            first.finish()
            await a.quiet()
            held = await a.granted("held")
            waits, task = a.waiter("waits")
            await until(lambda: waits.queued)
            await asyncio.to_thread(
                servers.until, lambda: server.say("INFO", "persistence")["aof_pending_bio_fsync"] == 0, "flushed"
            )  # type: ignore[index]
            written = time.monotonic()
            await until(lambda: time.monotonic() - written > 1.2)  # everysec
            epoch = leads.epoch
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            keys = {str(k).rpartition("}:")[2] for k in server.say("KEYS", f"maestro:{{{pool}}}:*")}  # type: ignore[attr-defined]
            assert {"stage:held", "stage:waits", "ready:m", "leases", "log", "fence", "salt"} <= keys
            assert held.grant
            await until(lambda: leads.epoch > epoch and leads.leading, 30)
            held.finish()
            await asyncio.wait_for(task, 20)
            assert waits.ticket.stage_id == "waits", "it was never pushed anew"
            waits.finish()
            await a.quiet()
            seen = [o.stage_id for o in await a.observations() if isinstance(o, Observation)]
            assert sorted(seen) == ["first", "held", "waits"]


def test_a_redis_that_may_throw_keys_away_is_noted(home: Path) -> None:
    """`maestro doctor` says what to set."""
    with servers.running(Server(home, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")) as server:
        (found,) = doctor.check_redis(server.url)
        assert found.status == "note"
        assert "noeviction" in found.remedy


# -- away ----------------------------------------------------------------------------------------------------------------
async def test_a_redis_that_is_away_is_tried_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses grow up to the cap, no two processes share them, and between tries every command fails at once."""
    moments: dict[int, list[float]] = {}
    now_s = 0.0
    monkeypatch.setattr(redis_module.time, "monotonic", lambda: now_s)
    for process in range(5):
        now_s = 0.0
        queue = RedisQueue("redis://127.0.0.1:1/0")
        for _ in range(3000):
            tried = queue._failures
            with pytest.raises(QueueUnavailable, match="does not answer"):
                await queue.switch()
            if queue._failures > tried:
                moments.setdefault(process, []).append(now_s)
            now_s += 0.01
        await queue.close()
    for tries in moments.values():
        pauses = [b - a for a, b in itertools.pairwise(tries)]
        assert pauses[0] <= 2 * redis_module.BACKOFF_BASE_S + 0.02
        assert max(pauses) <= redis_module.BACKOFF_CAP_S + 0.02
        assert all(p >= redis_module.BACKOFF_CAP_S / 2 - 0.01 for p in pauses[6:])
        assert 14 < len(tries) < 40
    assert len({tuple(tries) for tries in moments.values()}) == len(moments)


async def test_a_redis_that_is_back_is_found_at_once_again(pool: str) -> None:
    """After one answer the next failure's pause is the shortest again."""
    with EmbeddedRedis() as server:
        if server.url is None:
            pytest.skip("no Redis server here")
        async with queue_at(server.url, pool) as queue:
            server._process.stop()  # type: ignore[union-attr]

            async def failed_often() -> bool:
                with contextlib.suppress(QueueUnavailable):
                    await queue.switch()
                return queue._failures >= 3

            await until(failed_often)
            await asyncio.to_thread(server.restart)

            async def answers() -> bool:
                with contextlib.suppress(QueueUnavailable):
                    return bool(await queue.switch())
                return False

            await until(answers)
            assert queue._failures == 0


# -- moving --------------------------------------------------------------------------------------------------------------
async def test_a_pool_moves_and_no_stage_is_lost(home: Path, pool: str) -> None:
    """As docs/redis.md says: copy, end the scheduler, copy the rest, start it there; apps follow when they are started again."""
    with servers.running(Server(home / "old")) as old, servers.running(Server(home / "new")) as new:
        async with joined(old.url, pool, outage_after_s=0.5) as a:
            async with scheduler(old.url, pool, engine("e1")):
                done_before = await a.granted("before")
                done_before.finish()
                await a.quiet()
                held = await a.granted("held")
                waits, task = a.waiter("waits")
                await until(lambda: waits.queued)
                salt = await a.ask(a.room.queue.salt())
                await a.ask(a.room.queue.add_api_key("digest", "{}"))
                await a.ask(a.room.queue.publish_model("v1", card="{}", data=b"model", epoch=None))
                ran = await asyncio.to_thread(maestro, "redis", "move", "--to", new.url, "--redis-url", old.url, "--pool", pool, "--json")  # fmt: skip
                assert ran.exit_code == 0, ran.output
                assert json.loads(ran.stdout)["copied"]["log"] == 1
            held.finish()  # after the first copy, before the second
            await until(lambda: not a.room.held and not a.room.unsent)
            await asyncio.to_thread(maestro, "redis", "move", "--to", new.url, "--redis-url", old.url, "--pool", pool)
            async with scheduler(new.url, pool, engine("e1")), joined(new.url, pool) as b:
                assert (await asyncio.wait_for(task, 20)).engine_id == "e1", (
                    "nobody leads at the old place: let through"
                )
                waits.finish()
                q = await b.granted("q")
                q.finish()
                await b.quiet()
                seen = [o.stage_id for o in await b.observations() if isinstance(o, Observation)]
                assert seen == ["before", "held", "q"]
                assert await b.ask(b.room.queue.salt()) == salt
                assert await b.ask(b.room.queue.api_keys()) == {"digest": "{}"}
                assert await b.ask(b.room.queue.model("")) == ("v1", b"model")
                late = await asyncio.to_thread(maestro, "redis", "move", "--to", new.url, "--redis-url", old.url, "--pool", pool)  # fmt: skip
                assert "has led this pool at the other place" in str(late.exception)
            same = maestro("redis", "move", "--to", old.url, "--redis-url", old.url, "--pool", pool)
            assert "is in now" in str(same.exception)
