"""The queue in Redis: one Lua file per command (``lua/*.lua``), every key passed in, one hash tag per pool.

The only module that imports ``redis``. It keeps the promises of `ports.Queue`; `memory.MemoryQueue` is what it is held
to. Commands stay inside Redis 6.2.

Keys of a pool (prefix ``maestro:{pool}:``), all under one hash tag so that Redis Cluster keeps them in one slot:

    stage:<id>      hash    status, ticket, client, model; while granted also engine, token, epoch, kv, granted_at.
                            Expires some minutes after its end: the one terminal record of a stage
    ready:<model>   zset    waiting stages by due moment
    leases          zset    granted stages by the end of their lease
    clients         zset    client processes by the moment until which they are believed alive
    inbox:<client>  list    verdicts on their way to a client
    slots, kv       hash    engine -> what is reserved on it (granted and draining)
    draining        hash    <stage>#<token> -> "since kv engine": its stage ended, its engine may still compute
    credits         hash    epoch, until, <engine>:slots, <engine>:kv: what the fast path may spend; wait|<model>: seconds that
                            who is refused shall wait; tenant|<name>: "metered (1/0), most that may wait, such seconds"
    p99             hash    model|role -> output tokens
    epoch, fence    string  leadership's and grants' counters
    leader          hash    holder, until
    fleet           string  JSON of the engines (no keys, no secrets)
    tenants         string  JSON of the tenants: weight, clusters, quotas
    waits           zset    <length of tenant>:<tenant>|<stage>, all of score 0: waiting stages, to be counted by tenant
    usage:<day>     hash    [tenant, model, class, counter] (JSON) -> what they used that day (UTC); kept `USAGE_DAYS`
    charged_to      string  position in the log up to which usage was counted
    workflows       hash    fingerprint -> static graph, JSON
    log             stream  observations ("o") and ends of runs ("r")
    nodes           zset    nodes by the moment at which their report expires
    reports         hash    node -> what it said last of its GPUs and engines (`nodes.NodeReport`, JSON)
    wanted:<node>   stream  one entry: what is wanted of that node ("w": `nodes.Wanted`, JSON); its id is the version
    api_keys        hash    SHA-256 of a gateway's key -> whose it is (tenant, label, made_at_s), JSON; never the key
    switch          string  what the operator allows: ``on``, ``observe`` or ``off``, then who, when, why. No key: on
    models          hash    kept: versions of trained models, the one that rules first; card:<version>: JSON;
                            file:<version>: base64
    predictor       string  what the leader's predictor tells of itself, JSON
    rtts            hash    <site>|<cluster> -> "seconds at": the network there and back, as an app of the site measured it; inf:
                            it was not reached
    salt            string  what hashes of prompts are keyed with, in hexadecimal; made once
    wake            list    one element while the scheduler has something to look at
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib import resources
from typing import Any, Final

import redis.asyncio as aioredis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import EqualJitterBackoff, NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

from maestro_agents.core import (
    EngineSpec,
    Grant,
    Observation,
    Refusal,
    RunEnd,
    Status,
    Switch,
    Ticket,
    Verdict,
)
from maestro_agents.errors import ConfigError, QueueUnavailable, WireError
from maestro_agents.nodes import NodeReport, Wanted
from maestro_agents.ports import (
    MODEL_BYTES,
    MODELS_KEPT,
    NO_BACKLOG,
    RETRY_FLOOR_S,
    USAGE_DAYS,
    Backlog,
    Distance,
    Ledger,
    Renewal,
    Reservation,
    Running,
)
from maestro_agents.queue.embedded import RedisInfo
from maestro_agents.queue.memory import DEFAULT_P99_OUTPUT_TOKENS, LOG_LENGTH, SKIPPED_TOKENS
from maestro_agents.redis_url import RedisUrl, redis_url, without_password
from maestro_agents.tenants import Tenant

_PAGE: Final = 1_000

log = logging.getLogger("maestro")

RECORD_TTL_S: Final = 600
"""How long the terminal record of a stage is kept."""

CONNECT_TIMEOUT_S: Final = 2.0
COMMAND_TIMEOUT_S: Final = 3.0
BLOCK_LIMIT_S: Final = 2.0
"""Longest blocking read; shorter than the socket's patience."""

_TOLD: Final = 20
"""Kinds of tickets that are not understood, of which each is told once."""

BACKOFF_BASE_S: Final = 0.05
BACKOFF_CAP_S: Final = 2.0
"""After a connection failed the next is tried within twice the base, then within twice that, up to the cap, and never
before half of it: each process at a moment of its own, so that a fleet does not come back in step."""

_SCRIPTS: Final[Mapping[str, str]] = {
    entry.name.removesuffix(".lua"): entry.read_text(encoding="utf-8")
    for entry in (resources.files("maestro_agents.queue") / "lua").iterdir()
    if entry.name.endswith(".lua")
}
_SHA: Final = {
    name: hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest() for name, source in _SCRIPTS.items()
}
_POOL: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclasses.dataclass(slots=True)
class _Call:
    """A script on its way."""

    script: str
    #: Number of keys, keys, arguments.
    words: tuple[Any, ...]
    answer: asyncio.Future[Any]


class RedisQueue:
    """See `ports.Queue`. Raises `QueueUnavailable` where Redis does not answer.

    ``url``: see `maestro_agents.redis_url`. ``lease_s``: how long a grant or a client lives unrenewed. A connection that failed
    is tried again after a pause that grows (`BACKOFF_CAP_S`); until then every command fails at once.
    """

    def __init__(
        self,
        url: str,
        *,
        pool: str = "default",
        lease_s: float = 10.0,
        max_queue: int = 10_000,
        client: aioredis.Redis | None = None,
    ) -> None:
        if not _POOL.fullmatch(pool):
            raise ConfigError(f"pool {pool!r}: use 1 to 64 letters, digits, '_', '.' or '-'")
        self.lease_s = lease_s
        self.max_queue = max_queue
        self.log_length = LOG_LENGTH
        self._prefix = f"maestro:{{{pool}}}:"
        self.where = redis_url(url)
        self._redis: Any = client or _connect(self.where)
        self._backoff = EqualJitterBackoff(cap=min(BACKOFF_CAP_S, lease_s / 4), base=BACKOFF_BASE_S)
        self._failures = 0
        #: Nothing is tried before this moment of the monotonic clock, and why.
        self._resting_until_s = 0.0
        self._trouble = ""
        #: What was said of tickets that are not understood here.
        self._passed_over: set[str] = set()
        #: Node -> its last report, as it was read and as it was understood.
        self._said: dict[str, tuple[str, NodeReport]] = {}
        #: Tickets that ran when it was asked last, as they were read and as they were understood.
        self._tickets: dict[str, Ticket | None] = {}
        #: Model -> whose each waiting stage is, as far as it was asked.
        self._owners: dict[str, dict[str, str]] = {}
        self._led_epoch = 0
        self._batch: list[_Call] = []
        self._flushing: asyncio.Task[None] | None = None
        self._fixed = {
            k: self._prefix + k
            for k in (
                "leases clients slots kv draining credits p99 epoch fence leader fleet workflows log switch salt wake"
                " models predictor nodes reports tenants waits charged_to rtts api_keys".split()
            )
        }

    # -- keys and calls ----------------------------------------------------------------------------------------------
    def _keys(self, *names: str) -> list[str]:
        return [self._fixed[n] for n in names]

    def _stage(self, stage_id: str) -> str:
        return f"{self._prefix}stage:{stage_id}"

    def _ready(self, model: str) -> str:
        return f"{self._prefix}ready:{model}"

    def _inbox(self, client_id: str) -> str:
        return f"{self._prefix}inbox:{client_id}"

    def _wanted(self, node_id: str) -> str:
        return f"{self._prefix}wanted:{node_id}"

    @contextlib.asynccontextmanager
    async def _reachable(self) -> AsyncIterator[None]:
        """As `_reachable`; and nothing is tried while the pause after a failed connection lasts."""
        if time.monotonic() < self._resting_until_s:
            raise QueueUnavailable(self._trouble)
        try:
            async with _reachable():
                yield
        except QueueUnavailable as e:
            await self._rest(e)
            raise
        self._failures = 0

    async def _rest(self, error: QueueUnavailable) -> None:
        """After a failed connection: pause. After an answer that another server would not give: ask who leads."""
        if isinstance(error.__cause__, _TURNED_AWAY):
            if self.where.kind == "sentinel":
                await self._redis.connection_pool.disconnect(inuse_connections=False)
        elif isinstance(error.__cause__, ResponseError):
            pass  # it answers
        elif time.monotonic() >= self._resting_until_s:  # else it is one of many that failed together
            self._failures += 1
            self._trouble = str(error)
            self._resting_until_s = time.monotonic() + self._backoff.compute(min(self._failures, 16))

    async def _run(self, script: str, keys: Sequence[str], *args: object) -> Any:
        """Run a script. What is asked for in the same moment leaves in one round trip, each with its own answer."""
        answer = asyncio.get_running_loop().create_future()
        self._batch.append(_Call(script=script, words=(len(keys), *keys, *map(_text, args)), answer=answer))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        return await answer

    async def _flush(self) -> None:
        while self._batch:
            batch, self._batch = [c for c in self._batch if not c.answer.done()], []
            try:
                async with self._reachable():
                    replies = await self._evaluate(batch)
            except BaseException as e:
                for call in batch:
                    if not call.answer.done():
                        call.answer.set_exception(e)
                if not isinstance(e, Exception):
                    raise
                continue
            for call, reply in zip(batch, replies, strict=True):
                if call.answer.done():
                    continue
                if isinstance(reply, Exception):
                    error = _told(reply)
                    error.__cause__ = reply
                    if isinstance(error, QueueUnavailable):
                        await self._rest(error)
                    call.answer.set_exception(error)
                else:
                    call.answer.set_result(reply)

    async def _evaluate(self, batch: Sequence[_Call]) -> list[Any]:
        """Answers in order; a script's own error stands in its place. A server that lost the scripts gets them again."""
        replies = await self._send(batch)
        lost = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if lost:
            for name in {batch[i].script for i in lost}:
                await self._redis.script_load(_SCRIPTS[name])
            again = await self._send([batch[i] for i in lost])
            for i, reply in zip(lost, again, strict=True):
                replies[i] = reply
        return replies

    async def _send(self, batch: Sequence[_Call]) -> list[Any]:
        if len(batch) == 1:
            try:
                return [await self._redis.evalsha(_SHA[batch[0].script], *batch[0].words)]
            except ResponseError as e:
                return [e]
        pipe = self._redis.pipeline(transaction=False)
        for call in batch:
            pipe.execute_command("EVALSHA", _SHA[call.script], *call.words)  # pipe.evalsha is blocked for a Cluster
        return list(await pipe.execute(raise_on_error=False))

    # -- the client's side -------------------------------------------------------------------------------------------
    async def push(self, ticket: Ticket, *, engines: Sequence[EngineSpec], now_s: float) -> Verdict | None:
        allowed: list[object] = []
        for e in engines:
            allowed += (e.engine_id, e.kv_bytes_per_token, e.max_model_len)
            allowed += (e.kv_block_tokens, e.kv_window_tokens, e.kv_window_bytes_per_token)
        reply = await self._run(
            "push",
            [self._stage(ticket.stage_id), self._ready(ticket.model)]
            + self._keys("leases", "clients", "slots", "kv", "credits", "p99", "epoch", "fence", "wake", "waits"),
            ticket.stage_id,
            ticket.client_id,
            ticket.encode(),
            ticket.due_at_s,
            now_s,
            now_s + self.lease_s,
            ticket.model,
            ticket.role_key,
            ticket.prompt_tokens,
            -1 if ticket.max_tokens is None else ticket.max_tokens,
            int(ticket.nested),
            self.max_queue,
            DEFAULT_P99_OUTPUT_TOKENS,
            ticket.choices,
            ticket.tenant,
            *allowed,
        )
        if reply[0] == "granted":
            _, engine_id, token, epoch, kv, granted_at, until, fast, body = reply
            said = json.loads(body)
            return Grant(
                stage_id=ticket.stage_id,
                engine_id=engine_id,
                token=int(token),
                epoch=int(epoch or 0),
                kv_bytes=int(kv),
                granted_at_s=float(granted_at),
                lease_until_s=float(until or 0),
                fast=fast == "1",
                output_tokens=said.get("output_tokens", 0),
                priority=said.get("priority", 0),
                because=said.get("because", {}),
            )
        if reply[0] in ("full", "quota"):
            after_s = max(RETRY_FLOOR_S, float(reply[1]))
            return Refusal(stage_id=ticket.stage_id, reason=reply[0], retry_after_s=after_s)
        return None

    async def verdicts(self, client_id: str, timeout_s: float) -> Sequence[Verdict]:
        key = self._inbox(client_id)
        async with self._reachable():
            first = await self._redis.blpop([key], timeout=min(max(timeout_s, 0.01), BLOCK_LIMIT_S))
            if first is None:
                return ()
            rest: list[str] = await self._redis.lpop(key, 256) or []
        return tuple(_verdict(m) for m in (first[1], *rest))

    async def renew(self, client_id: str, stages: Mapping[str, int], *, now_s: float) -> Renewal:
        pairs = [x for pair in stages.items() for x in pair]
        epoch, led, *rest = await self._run(
            "renew",
            self._keys("clients", "leases", "epoch", "leader") + [self._stage(s) for s in stages],
            client_id,
            now_s + self.lease_s,
            now_s,
            *pairs,
        )
        found = list(zip(rest[::2], rest[1::2], strict=True))
        return Renewal(
            gone=tuple(s for kind, s in found if kind == "gone"),
            granted=tuple(s for kind, s in found if kind == "granted"),
            epoch=int(epoch),
            led=bool(led),
        )

    async def announce(self, ticket: Ticket, grant: Grant | None, *, now_s: float) -> None:
        held: tuple[object, ...] = (0,)
        if grant is not None:
            body = json.dumps(dataclasses.asdict(grant), separators=(",", ":"))
            g = grant
            held = (g.token, g.engine_id, g.kv_bytes, g.granted_at_s, g.epoch, int(g.fast), body)
        await self._run(
            "announce",
            [self._stage(ticket.stage_id), self._ready(ticket.model)]
            + self._keys("leases", "clients", "slots", "kv", "fence", "wake", "waits"),
            ticket.stage_id,
            ticket.client_id,
            ticket.encode(),
            ticket.due_at_s,
            now_s,
            now_s + self.lease_s,
            ticket.model,
            RECORD_TTL_S,
            *held,
            *[0] * (7 - len(held)),
            "" if ticket.nested else ticket.tenant,
        )

    async def finish(self, observation: Observation, *, client_id: str, token: int, now_s: float) -> bool:
        del now_s
        o = observation
        return bool(
            await self._run(
                "finish",
                [self._stage(o.stage_id), *self._keys("leases", "slots", "kv", "log"), self._ready(o.model)]
                + self._keys("wake"),
                o.stage_id,
                token,
                Status.DONE if o.status is Status.DONE else Status.FAILED,
                o.encode(),
                self.log_length,
                RECORD_TTL_S,
                client_id,
            )
        )

    async def requeue(self, ticket: Ticket, *, token: int, now_s: float, draining: bool) -> bool:
        return bool(
            await self._run(
                "requeue",
                [self._stage(ticket.stage_id), self._ready(ticket.model)]
                + self._keys("leases", "slots", "kv", "draining", "wake", "waits"),
                ticket.stage_id,
                token,
                ticket.encode(),
                ticket.due_at_s,
                now_s,
                int(draining),
                ticket.client_id,
            )
        )

    async def cancel(
        self, stage_id: str, model: str, *, client_id: str | None, now_s: float, draining: bool
    ) -> Status | None:
        before = await self._run(
            "cancel",
            [self._stage(stage_id), self._ready(model)]
            + self._keys("leases", "slots", "kv", "draining", "wake", "waits"),
            stage_id,
            now_s,
            int(draining),
            RECORD_TTL_S,
            client_id or "",
        )
        return Status(before) if before else None

    async def extend(self, stage_id: str, *, client_id: str, token: int, kv_bytes: int) -> bool | None:
        keys = [self._stage(stage_id), *self._keys("kv", "credits")]
        fits = await self._run("extend", keys, token, kv_bytes, client_id)
        return None if fits is None else bool(fits)

    async def end_run(self, run: RunEnd) -> None:
        await self._append("r", run.encode())

    async def observe(self, observation: Observation) -> None:
        await self._append("o", observation.encode())

    async def _append(self, kind: str, body: str) -> None:
        await self._run("log", self._keys("log"), kind, body, self.log_length)

    async def switch(self) -> Switch:
        async with self._reachable():
            return _switch(await self._redis.get(self._fixed["switch"]))

    async def set_switch(self, switch: Switch, *, if_lost: bool = False) -> None:
        async with self._reachable():
            await self._redis.set(self._fixed["switch"], switch.encode(), nx=if_lost)

    async def describe(self, workflow: str, spec: str) -> None:
        async with self._reachable():
            await self._redis.hsetnx(self._fixed["workflows"], workflow, spec)

    async def salt(self) -> bytes:
        async with self._reachable():
            pipe = self._redis.pipeline(transaction=False)
            pipe.set(self._fixed["salt"], secrets.token_hex(16), nx=True)
            pipe.get(self._fixed["salt"])
            _, found = await pipe.execute()
        return bytes.fromhex(found)

    async def fleet(self) -> Sequence[EngineSpec]:
        async with self._reachable():
            body = await self._redis.get(self._fixed["fleet"])
        return tuple(EngineSpec.decode(e) for e in json.loads(body)) if body else ()

    async def tenants(self) -> Sequence[Tenant]:
        async with self._reachable():
            body = await self._redis.get(self._fixed["tenants"])
        return tuple(Tenant.decode(t) for t in json.loads(body)) if body else ()

    async def tell_distances(self, distances: Sequence[Distance]) -> None:
        said = {f"{d.site}|{d.cluster}": f"{_text(d.rtt_s)} {_text(d.measured_at_s)}" for d in distances}
        if said:
            async with self._reachable():
                await self._redis.hset(self._fixed["rtts"], mapping=said)

    async def distances(self) -> Sequence[Distance]:
        async with self._reachable():
            body = await self._redis.hgetall(self._fixed["rtts"])
        found: list[Distance] = []
        for where, said in body.items():
            site, _, cluster = where.partition("|")
            with contextlib.suppress(ValueError):  # not by us
                rtt_s, at_s = map(float, said.split())
                found.append(Distance(site=site, cluster=cluster, rtt_s=rtt_s, measured_at_s=at_s))
        return found

    # -- the gateways' side ------------------------------------------------------------------------------------------
    async def add_api_key(self, digest: str, about: str) -> None:
        async with self._reachable():
            await self._redis.hset(self._fixed["api_keys"], digest, about)

    async def api_keys(self) -> Mapping[str, str]:
        async with self._reachable():
            return await self._redis.hgetall(self._fixed["api_keys"])

    async def remove_api_key(self, digest: str) -> bool:
        async with self._reachable():
            return bool(await self._redis.hdel(self._fixed["api_keys"], digest))

    # -- the scheduler's side ----------------------------------------------------------------------------------------
    async def lead(self, holder: str, *, ttl_s: float, now_s: float, at_least: int = 0) -> int | None:
        keys = self._keys("leader", "epoch", "fence")
        epoch = await self._run("lead", keys, holder, now_s, now_s + ttl_s, at_least, SKIPPED_TOKENS)
        if epoch is not None and int(epoch) != self._led_epoch:
            await self._tidy()
            self._led_epoch = int(epoch)
        return None if epoch is None else int(epoch)

    async def _tidy(self) -> None:
        """Forget entries of `waits` whose stages wait no more: commands of the release before leave them behind."""
        at = 0
        async with self._reachable():
            while page := await self._redis.zrange(self._fixed["waits"], at, at + _PAGE - 1):
                stages = [self._stage(_waits(entry)) for entry in page]
                at += len(page) - await self._run("tidy", [self._fixed["waits"], *stages], *page)

    async def wake(self, timeout_s: float) -> None:
        async with self._reachable():
            await self._redis.blpop([self._fixed["wake"]], timeout=min(max(timeout_s, 0.01), BLOCK_LIMIT_S))

    async def publish(
        self,
        engines: Sequence[EngineSpec],
        *,
        p99: Mapping[str, float],
        epoch: int,
        valid_until_s: float,
        tenants: Sequence[Tenant] = (),
        backlog: Backlog = NO_BACKLOG,
    ) -> bool:
        fleet, named = (json.dumps([x.encode() for x in these], separators=(",", ":")) for these in (engines, tenants))
        notes: list[object] = [x for model, s in backlog.models.items() for x in (f"wait|{model}", s)]
        for t in tenants:
            if t.has_quota:
                after_s = _text(backlog.tenants.get(t.name, 0.0))
                notes += (f"tenant|{t.name}", f"{int(t.metered)} {t.max_waiting} {after_s}")
        credit = [x for e in engines for x in (e.engine_id, e.slots, e.kv_bytes)]
        roles = [x for pair in p99.items() for x in pair]
        keys = self._keys("epoch", "credits", "p99", "fleet", "tenants")
        counts = (len(engines), len(notes) // 2)
        said = (*credit, *notes, *roles)
        return bool(await self._run("publish", keys, epoch, valid_until_s, fleet, named, *counts, *said))

    async def heads(self, model: str, n: int, *, at_most: Mapping[str, int] | None = None) -> Sequence[Ticket]:
        async with self._reachable():
            if at_most:
                found = await self._heads_of(model, n, at_most)
            else:
                found = await self._redis.zrange(self._ready(model), 0, n - 1, withscores=True)
            if not found:
                return ()
            pipe = self._redis.pipeline(transaction=False)
            for stage_id, _ in found:
                pipe.hget(self._stage(stage_id), "ticket")
            bodies = await pipe.execute()
        tickets: list[Ticket] = []
        for (_, due_at_s), body in zip(found, bodies, strict=True):
            if body is not None and (ticket := self._ticket(body)) is not None:
                tickets.append(ticket.evolve(due_at_s=due_at_s))
        return tickets

    def _ticket(self, body: str) -> Ticket | None:
        """A ticket as Redis has it; None, said once, where it is of a version that is some other scheduler's."""
        try:
            return Ticket.decode(body)
        except WireError as e:
            if str(e) not in self._passed_over and len(self._passed_over) < _TOLD:
                self._passed_over.add(str(e))
                log.warning("stages of %s are passed over here: %s", self._prefix.rstrip(":"), e)
            return None

    async def _heads_of(self, model: str, n: int, at_most: Mapping[str, int]) -> list[tuple[str, float]]:
        """The first stages of a model, no more than ``at_most`` of some tenants. Whose a stage is, is asked once."""
        known, seen = self._owners.get(model, {}), dict[str, str]()
        found: list[tuple[str, float]] = []
        left = {_whose(tenant): bound for tenant, bound in at_most.items()}
        at = 0
        while page := await self._redis.zrange(self._ready(model), at, at + _PAGE - 1, withscores=True):
            at += len(page)
            new = [stage_id for stage_id, _ in page if stage_id not in known]
            pipe = self._redis.pipeline(transaction=False)
            for stage_id in new:
                pipe.hget(self._stage(stage_id), "whose")
            told = dict(zip(new, await pipe.execute(), strict=True)) if new else {}
            for stage_id, due_at_s in page:
                whose = seen[stage_id] = known.get(stage_id) or told.get(stage_id) or ""
                if whose in left:
                    left[whose] -= 1
                    if left[whose] < 0:
                        continue
                elif n <= 0:
                    at = -1
                    break
                else:
                    n -= 1
                found.append((stage_id, due_at_s))
            if at < 0 or len(page) < _PAGE:
                break
        self._owners[model] = seen
        return found

    async def waiting(self, tenants: Collection[str]) -> Mapping[str, int]:
        names = list(tenants)
        async with self._reachable():
            pipe = self._redis.pipeline(transaction=False)
            for name in names:
                pipe.zlexcount(self._fixed["waits"], f"[{_whose(name)}|", f"({_whose(name)}}}")
            counts: list[int] = await pipe.execute() if names else []
        return dict(zip(names, counts, strict=True))

    async def reorder(self, moments: Mapping[str, float], model: str) -> None:
        if moments:
            async with self._reachable():
                await self._redis.zadd(self._ready(model), dict(moments), xx=True)

    async def grant(self, grant: Grant, ticket: Ticket, *, now_s: float) -> Grant | None:
        given = dataclasses.replace(grant, granted_at_s=now_s, lease_until_s=now_s + self.lease_s, fast=False)
        body = dataclasses.asdict(given)
        del body["token"]
        token = await self._run(
            "grant",
            [self._stage(grant.stage_id), self._ready(ticket.model)]
            + self._keys("leases", "clients", "slots", "kv", "credits", "epoch", "fence")
            + [self._inbox(ticket.client_id), *self._keys("waits")],
            grant.stage_id,
            grant.engine_id,
            grant.kv_bytes,
            grant.epoch,
            now_s,
            now_s + self.lease_s,
            json.dumps(body, separators=(",", ":")),
            math.ceil(4 * self.lease_s),
            RECORD_TTL_S,
            int(ticket.nested),
        )
        return None if token is None else dataclasses.replace(given, token=int(token))

    async def described(self, workflow: str) -> str | None:
        async with self._reachable():
            found = await self._redis.hget(self._fixed["workflows"], workflow)
        return None if found is None else str(found)

    async def refuse(self, refusal: Refusal, ticket: Ticket, *, now_s: float) -> bool:
        del now_s
        body = json.dumps({"refusal": dataclasses.asdict(refusal)}, separators=(",", ":"))
        keys = [self._stage(ticket.stage_id), self._ready(ticket.model), self._inbox(ticket.client_id)]
        keys += self._keys("waits")
        return bool(await self._run("refuse", keys, ticket.stage_id, body, math.ceil(4 * self.lease_s), RECORD_TTL_S))

    async def reap(self, *, now_s: float) -> Sequence[str]:
        async with self._reachable():
            suspects: list[tuple[str, str]] = [
                (s, "") for s in await self._redis.zrangebyscore(self._fixed["leases"], "-inf", now_s)
            ]
            dead = set(await self._redis.zrangebyscore(self._fixed["clients"], "-inf", now_s))
            if dead:
                served = {e.model for e in await self.fleet()}
                for report in await self.reports(now_s):  # stages wait for models that sleep, too
                    served |= {e.spec.model for e in report.engines}
                for model in served:
                    suspects += await self._waiting_of(dead, model)
        lost: list[str] = []
        for stage_id, model in suspects:
            keys = [self._stage(stage_id), self._ready(model), *self._keys("leases", "clients", "draining", "waits")]
            if await self._run("lose", keys, stage_id, now_s, RECORD_TTL_S):
                lost.append(stage_id)
        if dead:
            async with self._reachable():
                await self._redis.zremrangebyscore(self._fixed["clients"], "-inf", now_s)
        return lost

    async def _waiting_of(self, clients: set[str], model: str) -> list[tuple[str, str]]:
        """Waiting stages of these clients: a walk over the ready set, made only after a client died."""
        found: list[tuple[str, str]] = []
        ids = await self._redis.zrange(self._ready(model), 0, -1)
        for i in range(0, len(ids), 500):
            pipe = self._redis.pipeline(transaction=False)
            for stage_id in ids[i : i + 500]:
                pipe.hget(self._stage(stage_id), "client")
            owners = await pipe.execute()
            found += [(s, model) for s, c in zip(ids[i : i + 500], owners, strict=True) if c in clients]
        return found

    async def draining(self) -> Sequence[Reservation]:
        async with self._reachable():
            body = await self._redis.hgetall(self._fixed["draining"])
        found: list[Reservation] = []
        for key, value in body.items():
            since, kv, engine_id = value.split(" ", 2)
            found.append(Reservation(stage_id=key, engine_id=engine_id, kv_bytes=int(kv), since_s=float(since)))
        return found

    async def settle(self, reservation: Reservation) -> bool:
        r = reservation
        keys = self._keys("draining", "slots", "kv", "wake")
        return bool(await self._run("settle", keys, r.stage_id, r.engine_id, r.kv_bytes))

    async def running(self) -> Sequence[Running]:
        async with self._reachable():
            leases = await self._redis.zrange(self._fixed["leases"], 0, -1, withscores=True)
            pipe = self._redis.pipeline(transaction=False)
            for stage_id, _ in leases:
                pipe.hmget(self._stage(stage_id), "ticket", "engine", "token", "kv", "granted_at", "grant")
            rows = await pipe.execute()
        before = self._tickets  # of the last time: a leader with quotas to keep asks in every round
        tickets = self._tickets = {row[0]: before.get(row[0]) or self._ticket(row[0]) for row in rows if row[0]}
        return [
            Running(
                ticket=known,
                engine_id=engine_id,
                token=int(token),
                kv_bytes=int(kv),
                granted_at_s=float(granted_at),
                lease_until_s=until,
                output_tokens=(said := json.loads(grant or "{}")).get("output_tokens", 0),
                because=said.get("because", {}),
            )
            for (_, until), (ticket, engine_id, token, kv, granted_at, grant) in zip(leases, rows, strict=True)
            if ticket and engine_id and (known := tickets[ticket]) is not None
        ]

    async def ledger(self) -> Ledger:
        async with self._reachable():
            # redis-py 8.1 cannot parse HGETALL in a Cluster's transaction; one node reads two commands of one write together
            pipe = self._redis.pipeline(transaction=self.where.kind != "cluster")
            pipe.hgetall(self._fixed["slots"])
            pipe.hgetall(self._fixed["kv"])
            slots, kv = await pipe.execute()
        return Ledger(
            slots={k: int(v) for k, v in slots.items() if int(v)}, kv_bytes={k: int(v) for k, v in kv.items() if int(v)}
        )

    async def depth(self, model: str) -> int:
        async with self._reachable():
            return int(await self._redis.zcard(self._ready(model)))

    async def read_log(self, after: str, n: int) -> tuple[str, Sequence[Observation | RunEnd]]:
        async with self._reachable():
            rows = await self._redis.xrange(self._fixed["log"], min=f"({after}" if after else "-", count=n)
        entries: list[Observation | RunEnd] = []
        for _, fields in rows:
            with contextlib.suppress(WireError, KeyError):  # one bad entry does not stop the reader
                entries.append(Observation.decode(fields["o"]) if "o" in fields else RunEnd.decode(fields["r"]))
        return (rows[-1][0] if rows else after), entries

    async def charge(self, days: Mapping[str, Mapping[str, int]], *, after: str, to: str, epoch: int) -> bool:
        keys = [*self._keys("epoch", "charged_to"), *(f"{self._prefix}usage:{day}" for day in days)]
        said: list[object] = []
        for day, counters in days.items():
            ends = datetime.fromisoformat(day).replace(tzinfo=UTC) + timedelta(days=USAGE_DAYS + 1)
            said += (int(ends.timestamp()), len(counters), *(x for pair in counters.items() for x in pair))
        return bool(await self._run("usage", keys, epoch, after, to, *said))

    async def charged_to(self) -> str:
        async with self._reachable():
            return str(await self._redis.get(self._fixed["charged_to"]) or "")

    async def usage(self, day: str) -> Mapping[str, int]:
        async with self._reachable():
            found = await self._redis.hgetall(f"{self._prefix}usage:{day}")
        return {counter: int(n) for counter, n in found.items()}

    async def publish_model(self, version: str, *, card: str, data: bytes | None, epoch: int | None) -> bool:
        if data is not None and len(data) > MODEL_BYTES:
            raise ValueError(f"model {version} has {len(data)} bytes: {MODEL_BYTES} at most")
        file = ("0", "", "") if data is None else ("1", card, base64.b64encode(data).decode())
        ruled = -1 if epoch is None else epoch
        return bool(await self._run("publish_model", self._keys("epoch", "models"), ruled, version, MODELS_KEPT, *file))

    async def model(self, known: str) -> tuple[str, bytes] | None:
        async with self._reachable():
            kept = str(await self._redis.hget(self._fixed["models"], "kept") or "").split()
            if not kept or kept[0] == known:
                return None
            data = await self._redis.hget(self._fixed["models"], f"file:{kept[0]}")
        try:
            return kept[0], base64.b64decode(data or "", validate=True)
        except ValueError:  # not by us: whoever decodes the model will say that it is none
            return kept[0], str(data).encode()

    async def models(self) -> Mapping[str, str]:
        async with self._reachable():
            kept = str(await self._redis.hget(self._fixed["models"], "kept") or "").split()
            if not kept:
                return {}
            cards = await self._redis.hmget(self._fixed["models"], [f"card:{version}" for version in kept])
        return {version: card or "{}" for version, card in zip(kept, cards, strict=True)}

    async def set_predictor_status(self, status: str) -> None:
        async with self._reachable():
            await self._redis.set(self._fixed["predictor"], status)

    async def predictor_status(self) -> str:
        async with self._reachable():
            return str(await self._redis.get(self._fixed["predictor"]) or "")

    # -- the nodes' side ---------------------------------------------------------------------------------------------
    async def report(self, report: NodeReport, *, now_s: float, ttl_s: float) -> None:
        keys = self._keys("nodes", "reports", "wake")
        await self._run("report", keys, report.node_id, now_s, now_s + ttl_s, report.encode())

    async def reports(self, now_s: float) -> Sequence[NodeReport]:
        async with self._reachable():
            nodes = sorted(await self._redis.zrangebyscore(self._fixed["nodes"], f"({_text(now_s)}", "+inf"))
            bodies: list[str | None] = await self._redis.hmget(self._fixed["reports"], nodes) if nodes else []
        said = self._said
        self._said = {}
        for node_id, body in zip(nodes, bodies, strict=True):
            with contextlib.suppress(WireError):  # a node of another version is some other scheduler's
                if body is not None:
                    known = said.get(node_id)
                    self._said[node_id] = known if known and known[0] == body else (body, NodeReport.decode(body))
        return [report for _, report in self._said.values()]

    async def want(self, node_id: str, wanted: Wanted) -> bool:
        keys = [*self._keys("epoch"), self._wanted(node_id)]
        return bool(await self._run("want", keys, wanted.epoch, wanted.encode()))

    async def wanted(self, node_id: str, *, known: str, timeout_s: float) -> tuple[str, Wanted] | None:
        key = self._wanted(node_id)
        async with self._reachable():
            entries: list[tuple[str, Mapping[str, str]]] = await self._redis.xrevrange(key, count=1)
            if timeout_s > 0.0 and (not entries or entries[0][0] == known):
                block_ms = round(1000 * min(max(timeout_s, 0.01), BLOCK_LIMIT_S))
                read = await self._redis.xread({key: known if entries else "0"}, block=block_ms)
                entries = read[0][1] if read else []
        if not entries or entries[-1][0] == known:
            return None
        return entries[-1][0], Wanted.decode(entries[-1][1]["w"])

    async def incarnation(self) -> str:
        """Of the server that holds the pool now: its process, and since when it leads. A failover is a restart: what was
        acknowledged a moment before may be missing.
        """
        async with self._reachable():
            here = await self._here()
            try:
                run_id = (await self._redis.info("server", **here))["run_id"]
                return f"{run_id} {(await self._redis.info('replication', **here)).get('master_replid', '')}"
            except (ResponseError, KeyError):  # no INFO for this user, or a server without it
                return "unknown"

    async def _here(self) -> Mapping[str, Any]:
        """Names the pool's own node to a command that has no key."""
        if self.where.kind != "cluster":
            return {}
        await self._redis.initialize()
        return {"target_nodes": self._redis.get_node_from_key(self._prefix)}

    async def server_time_s(self) -> float:
        """The server's clock, so that all clients agree on moments."""
        async with self._reachable():
            seconds, micros = await self._redis.time(**await self._here())
        return seconds + micros / 1e6

    async def about(self) -> RedisInfo:
        """What the server that holds the pool says of itself. Raises `QueueUnavailable` with the reason."""
        async with self._reachable():
            here = await self._here()
            await self._redis.ping(**here)
            began_s = time.perf_counter()
            await self._redis.ping(**here)
            latency_s = time.perf_counter() - began_s
            told = await self._redis.info(**here)
        role = f"master {self.where.master!r}" if self.where.master else ""
        if self.where.kind == "cluster":
            role = f"a node of {len(self._redis.get_primaries())}"
        return RedisInfo(
            version=str(told.get("redis_version", "?")),
            process_id=int(told.get("process_id", 0)),
            latency_s=latency_s,
            role=role,
            evicts=told.get("maxmemory_policy", "noeviction") if told.get("maxmemory") else "noeviction",
        )

    async def status(self, stage_id: str) -> Status | None:
        """The status of a stage, also of one that ended lately."""
        async with self._reachable():
            found = await self._redis.hget(self._stage(stage_id), "status")
        return Status(found) if found else None

    async def leader(self) -> str:
        """Who holds leadership, also where that has expired; "" where nobody ever led."""
        async with self._reachable():
            return str(await self._redis.hget(self._fixed["leader"], "holder") or "")

    async def records(self) -> Sequence[Mapping[str, str]]:
        """Each stage's last grant and status as Redis has them, also of stages that ended lately. It walks all keys: for benches."""
        fields = ("status", "client", "engine", "token", "epoch", "granted_at", "fast")
        async with self._reachable():
            keys: list[str] = [key async for key in self._redis.scan_iter(match=self._stage("*"), count=1000)]
            pipe = self._redis.pipeline(transaction=False)
            for key in keys:
                pipe.hmget(key, *fields)
            rows: list[list[str | None]] = await pipe.execute() if keys else []
        prefix = len(self._stage(""))
        return [
            {"stage": key[prefix:], **{f: v for f, v in zip(fields, row, strict=True) if v is not None}}
            for key, row in zip(keys, rows, strict=True)
        ]

    async def copy_to(self, other: RedisQueue, copied: Callable[[str, int], None]) -> Mapping[str, int]:
        """Copy what a pool must not lose, and nobody announces again, into the same pool of another Redis. Returns how
        many entries of each key were written, and tells ``copied`` meanwhile. Raises `ConfigError` where a scheduler has led there.
        """
        done: dict[str, int] = {}
        async with other._reachable():
            if await other._redis.get(other._fixed["epoch"]):
                raise ConfigError(
                    "a scheduler has led this pool at the other place already: copy first, then start it there"
                )
        async with self._reachable():
            days = [k async for k in self._redis.scan_iter(match=f"{self._prefix}usage:*", **await self._here())]
            kept = [self._prefix + name for name in ("salt", "switch", "charged_to", "workflows", "models", "api_keys")]
            for key in (*kept, *sorted(days)):
                kind = await self._redis.type(key)
                body = await (self._redis.get(key) if kind == "string" else self._redis.hgetall(key))
                async with other._reachable():
                    await other._redis.delete(key)
                    if body:
                        await (
                            other._redis.set(key, body) if kind == "string" else other._redis.hset(key, mapping=body)
                        )
                done[key.removeprefix(self._prefix)] = len(body or ()) if kind == "hash" else int(bool(body))
                copied(key.removeprefix(self._prefix), 1)
            log, n = self._fixed["log"], 0
            async with other._reachable():
                last = await other._redis.xrevrange(log, count=1)
            after = last[0][0] if last else ""
            while rows := await self._redis.xrange(log, min=f"({after}" if after else "-", count=500):
                async with other._reachable():
                    pipe = other._redis.pipeline(transaction=False)
                    for position, fields in rows:
                        pipe.xadd(log, fields, id=position)
                    await pipe.execute()
                after, n = rows[-1][0], n + len(rows)
                copied("log", n)
        return {**done, "log": n}

    async def close(self) -> None:
        if self._flushing is not None and not self._flushing.done():
            await asyncio.wait([self._flushing], timeout=COMMAND_TIMEOUT_S)
        clients = [self._redis]
        if self.where.kind == "sentinel":
            clients += self._redis.connection_pool.sentinel_manager.sentinels
        for client in clients:
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()


@contextlib.asynccontextmanager
async def _reachable() -> AsyncIterator[None]:
    """Turn a connection's troubles into `QueueUnavailable`; an error of ours (a wrong script) stays what it is.

    A cancellation that came meanwhile is raised here: redis-py waits with `asyncio.wait_for`, which before Python 3.12
    forgets one that arrives together with the answer (cpython issue 86296), and the cancelled task would live on.
    """
    task = asyncio.current_task()
    cancelled = task.cancelling() if task else 0
    try:
        yield
    except (RedisError, RedisClusterException, OSError, TimeoutError) as e:
        raise _told(e) from e
    if task and task.cancelling() > cancelled:
        raise asyncio.CancelledError


def _told(error: Exception) -> Exception:
    """What a caller is told of an error of Redis."""
    if isinstance(error, NoPermissionError) or (isinstance(error, ResponseError) and "NOPERM" in str(error)):
        return QueueUnavailable(
            f"This Redis user may not do that ({error}). Use the user of the role: `maestro redis acl` prints them."
        )
    if isinstance(error, AuthenticationError):
        return QueueUnavailable(f"Redis lets nobody in by this user and password ({error}). Correct MAESTRO_REDIS_URL.")
    if isinstance(error, _TURNED_AWAY) or (isinstance(error, ResponseError) and _not_ready(str(error))):
        return QueueUnavailable(f"Redis is not ready: {error}")
    if isinstance(error, ResponseError):
        if str(error).startswith("unknown command"):
            return QueueUnavailable(f"Redis does not do what Maestro needs ({error}). Run `maestro doctor`.")
        return error
    if isinstance(error, (RedisError, RedisClusterException, OSError, TimeoutError)):
        return QueueUnavailable(f"Redis does not answer ({type(error).__name__}: {error}). Run `maestro doctor`.")
    return error


_TURNED_AWAY: Final = (
    ReadOnlyError,
    MasterDownError,
    ClusterDownError,
    TryAgainError,
    BusyLoadingError,
    OutOfMemoryError,
)
"""A server that answers, but not with what was asked: waiting helps, or another server, or an operator must."""


def _not_ready(text: str) -> bool:
    """The same, where redis-py knows no class for it, or where it happened inside a script (Redis 6)."""
    return text.startswith(("BUSY", "MISCONF", "UNBLOCKED", "LOADING", "OOM", "NOREPLICAS")) or "-READONLY" in text


def _whose(tenant: str) -> str:
    """A tenant as scripts write it: names of any kind, and none is the beginning of another's."""
    return f"{len(tenant.encode())}:{tenant}"


def _waits(entry: str) -> str:
    """The stage that an entry of ``waits`` names."""
    size, _, rest = entry.encode().partition(b":")
    return rest[int(size) + 1 :].decode()


def _text(value: object) -> str:
    """A number as Lua's ``tonumber`` reads it, without losing digits."""
    return repr(value) if isinstance(value, float) else str(value)


def _verdict(message: str) -> Verdict:
    token, _, body = message.partition(" ")
    fields = json.loads(body)
    if "refusal" in fields:
        return Refusal(**{k: v for k, v in fields["refusal"].items() if k in _REFUSAL_FIELDS})
    return Grant(token=int(token), **{k: v for k, v in fields.items() if k in _GRANT_FIELDS})


_GRANT_FIELDS: Final = frozenset(f.name for f in dataclasses.fields(Grant)) - {"token"}
_REFUSAL_FIELDS: Final = frozenset(f.name for f in dataclasses.fields(Refusal))
"""What a scheduler of a newer release says besides is left out."""


def _switch(text: str | None) -> Switch:
    try:
        return Switch.decode(text)
    except WireError as e:
        return Switch(reason=f"not understood: {e}")


def _connect(where: RedisUrl) -> Any:
    """A client of redis-py. It connects when it is first used, sends nothing twice, and leaves pauses to `RedisQueue`."""
    never = Retry(NoBackoff(), 0)
    each: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": COMMAND_TIMEOUT_S,
        "retry": never,
        "protocol": 2,
    }
    if where.tls:
        each |= {"ssl": True, **{k: v for k, v in where.options.items() if k.startswith("ssl_")}}
        if "ssl_check_hostname" in each:
            each["ssl_check_hostname"] = each["ssl_check_hostname"].lower() in {"1", "true", "yes"}
    kept: dict[str, Any] = {
        **each,
        "decode_responses": True,
        "health_check_interval": 15,
        "username": where.username,
        "password": where.password,
    }
    if where.kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in where.hosts]
        return RedisCluster(startup_nodes=nodes, require_full_coverage=False, **kept)
    if where.kind == "sentinel":
        names = ("username", "password")
        ours = {name: where.options.get(f"sentinel_{name}") for name in names}
        sentinel = Sentinel(where.hosts, sentinel_kwargs={**each, **ours}, **kept)
        return sentinel.master_for(where.master, db=where.db)
    if where.kind == "unix":
        return aioredis.Redis(unix_socket_path=where.path, db=where.db, **kept)
    host, port = where.hosts[0]
    return aioredis.Redis(host=host, port=port, db=where.db, **kept)


def reach(url: str, *, pool: str = "default") -> RedisInfo:
    """Ask the Redis at ``url`` who it is, on the way that the queue takes. Raises `QueueUnavailable` with the reason.

    Blocks, also where an event loop runs.
    """
    found: list[RedisInfo | Exception] = []

    async def look() -> None:
        queue = RedisQueue(url, pool=pool)
        try:
            found.append(await queue.about())
        except Exception as e:
            found.append(e)
        finally:
            await queue.close()

    thread = threading.Thread(target=lambda: asyncio.run(look()), name="maestro-reach", daemon=True)
    thread.start()
    thread.join()
    (told,) = found
    if isinstance(told, QueueUnavailable):
        why, shown = str(told).removesuffix(" Run `maestro doctor`.").rstrip("."), without_password(url)
        silent = "Redis does not answer "
        if why.startswith(silent):
            why = why.removeprefix(silent).removeprefix("(").removesuffix(")").rstrip(".")
            raise QueueUnavailable(f"Redis at {shown} does not answer: {why}") from told
        raise QueueUnavailable(f"Redis at {shown}: {why}") from told
    if isinstance(told, Exception):
        raise told
    return told


class RedisClock:
    """The server's clock, read once at ``sync`` and carried forward by this machine's monotonic clock."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    async def sync(self, queue: RedisQueue) -> None:
        before = time.monotonic()
        server_s = await queue.server_time_s()
        self._offset_s = server_s - (before + time.monotonic()) / 2

    def now_s(self) -> float:
        return time.monotonic() + self._offset_s
