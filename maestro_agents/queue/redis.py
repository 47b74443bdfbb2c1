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
    credits         hash    epoch, until, <engine>:slots, <engine>:kv: what the fast path may spend
    p99             hash    model|role -> output tokens
    epoch, fence    string  leadership's and grants' counters
    leader          hash    holder, until
    fleet           string  JSON of the engines (no keys, no secrets)
    workflows       hash    fingerprint -> static graph, JSON
    log             stream  observations ("o") and ends of runs ("r")
    nodes           zset    nodes by the moment at which their report expires
    reports         hash    node -> what it said last of its GPUs and engines (`nodes.NodeReport`, JSON)
    wanted:<node>   stream  one entry: what is wanted of that node ("w": `nodes.Wanted`, JSON); its id is the version
    switch          string  what the operator allows: ``on``, ``observe`` or ``off``, then who, when, why. No key: on
    models          hash    kept: versions of trained models, the one that rules first; card:<version>: JSON;
                            file:<version>: base64
    predictor       string  what the leader's predictor tells of itself, JSON
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
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib import resources
from typing import Any, Final

import redis.asyncio as aioredis
from redis.exceptions import NoScriptError, RedisError, ResponseError

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
from maestro_agents.ports import MODEL_BYTES, MODELS_KEPT, Ledger, Renewal, Reservation, Running
from maestro_agents.queue.memory import DEFAULT_P99_OUTPUT_TOKENS, LOG_LENGTH, RETRY_FLOOR_S

RECORD_TTL_S: Final = 600
"""How long the terminal record of a stage is kept."""

CONNECT_TIMEOUT_S: Final = 2.0
COMMAND_TIMEOUT_S: Final = 3.0
BLOCK_LIMIT_S: Final = 2.0
"""Longest blocking read; shorter than the socket's patience."""

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

    ``url``: ``redis://``, ``rediss://`` or ``unix://``. ``lease_s``: how long a grant or a client lives unrenewed.
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
        try:
            self._redis: Any = client or aioredis.Redis.from_url(
                url,
                decode_responses=True,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                socket_timeout=COMMAND_TIMEOUT_S,
                health_check_interval=15,
            )
        except ValueError as e:
            raise ConfigError(f"redis URL {_without_password(url)!r}: {e}") from e
        #: Node -> its last report, as it was read and as it was understood.
        self._said: dict[str, tuple[str, NodeReport]] = {}
        self._batch: list[_Call] = []
        self._flushing: asyncio.Task[None] | None = None
        self._fixed = {
            k: self._prefix + k
            for k in (
                "leases clients slots kv draining credits p99 epoch fence leader fleet workflows log switch salt wake"
                " models predictor nodes reports".split()
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
                async with _reachable():
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
                    call.answer.set_exception(_told(reply))
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
            pipe.evalsha(_SHA[call.script], *call.words)
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
            + self._keys("leases", "clients", "slots", "kv", "credits", "p99", "epoch", "fence", "wake"),
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
        if reply[0] == "full":
            return Refusal(stage_id=ticket.stage_id, reason="full", retry_after_s=RETRY_FLOOR_S)
        return None

    async def verdicts(self, client_id: str, timeout_s: float) -> Sequence[Verdict]:
        key = self._inbox(client_id)
        async with _reachable():
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
            + self._keys("leases", "clients", "slots", "kv", "fence", "wake"),
            ticket.stage_id,
            ticket.client_id,
            ticket.encode(),
            ticket.due_at_s,
            now_s,
            now_s + self.lease_s,
            ticket.model,
            RECORD_TTL_S,
            *held,
        )

    async def finish(self, observation: Observation, *, token: int, now_s: float) -> bool:
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
            )
        )

    async def requeue(self, ticket: Ticket, *, token: int, now_s: float, draining: bool) -> bool:
        return bool(
            await self._run(
                "requeue",
                [self._stage(ticket.stage_id), self._ready(ticket.model)]
                + self._keys("leases", "slots", "kv", "draining", "wake"),
                ticket.stage_id,
                token,
                ticket.encode(),
                ticket.due_at_s,
                now_s,
                int(draining),
            )
        )

    async def cancel(self, stage_id: str, model: str, *, now_s: float, draining: bool) -> Status | None:
        before = await self._run(
            "cancel",
            [self._stage(stage_id), self._ready(model)] + self._keys("leases", "slots", "kv", "draining", "wake"),
            stage_id,
            now_s,
            int(draining),
            RECORD_TTL_S,
        )
        return Status(before) if before else None

    async def extend(self, stage_id: str, *, token: int, kv_bytes: int) -> bool | None:
        keys = [self._stage(stage_id), *self._keys("kv", "credits")]
        fits = await self._run("extend", keys, token, kv_bytes)
        return None if fits is None else bool(fits)

    async def end_run(self, run: RunEnd) -> None:
        await self._append("r", run.encode())

    async def observe(self, observation: Observation) -> None:
        await self._append("o", observation.encode())

    async def _append(self, kind: str, body: str) -> None:
        await self._run("log", self._keys("log"), kind, body, self.log_length)

    async def switch(self) -> Switch:
        async with _reachable():
            return _switch(await self._redis.get(self._fixed["switch"]))

    async def set_switch(self, switch: Switch, *, if_lost: bool = False) -> None:
        async with _reachable():
            await self._redis.set(self._fixed["switch"], switch.encode(), nx=if_lost)

    async def describe(self, workflow: str, spec: str) -> None:
        async with _reachable():
            await self._redis.hsetnx(self._fixed["workflows"], workflow, spec)

    async def salt(self) -> bytes:
        async with _reachable():
            pipe = self._redis.pipeline(transaction=True)
            pipe.set(self._fixed["salt"], secrets.token_hex(16), nx=True)
            pipe.get(self._fixed["salt"])
            _, found = await pipe.execute()
        return bytes.fromhex(found)

    async def fleet(self) -> Sequence[EngineSpec]:
        async with _reachable():
            body = await self._redis.get(self._fixed["fleet"])
        return tuple(EngineSpec.decode(e) for e in json.loads(body)) if body else ()

    # -- the scheduler's side ----------------------------------------------------------------------------------------
    async def lead(self, holder: str, *, ttl_s: float, now_s: float, at_least: int = 0) -> int | None:
        epoch = await self._run("lead", self._keys("leader", "epoch"), holder, now_s, now_s + ttl_s, at_least)
        return None if epoch is None else int(epoch)

    async def wake(self, timeout_s: float) -> None:
        async with _reachable():
            await self._redis.blpop([self._fixed["wake"]], timeout=min(max(timeout_s, 0.01), BLOCK_LIMIT_S))

    async def publish(
        self, engines: Sequence[EngineSpec], *, p99: Mapping[str, float], epoch: int, valid_until_s: float
    ) -> bool:
        fleet = json.dumps([e.encode() for e in engines], separators=(",", ":"))
        credit = [x for e in engines for x in (e.engine_id, e.slots, e.kv_bytes)]
        roles = [x for pair in p99.items() for x in pair]
        keys = self._keys("epoch", "credits", "p99", "fleet")
        return bool(await self._run("publish", keys, epoch, valid_until_s, fleet, len(engines), *credit, *roles))

    async def heads(self, model: str, n: int) -> Sequence[Ticket]:
        async with _reachable():
            found = await self._redis.zrange(self._ready(model), 0, n - 1, withscores=True)
            if not found:
                return ()
            pipe = self._redis.pipeline(transaction=False)
            for stage_id, _ in found:
                pipe.hget(self._stage(stage_id), "ticket")
            bodies = await pipe.execute()
        tickets: list[Ticket] = []
        for (_, due_at_s), body in zip(found, bodies, strict=True):
            with contextlib.suppress(WireError):  # a ticket of another version is some other scheduler's
                if body is not None:
                    tickets.append(Ticket.decode(body).evolve(due_at_s=due_at_s))
        return tickets

    async def reorder(self, moments: Mapping[str, float], model: str) -> None:
        if moments:
            async with _reachable():
                await self._redis.zadd(self._ready(model), dict(moments), xx=True)

    async def grant(self, grant: Grant, ticket: Ticket, *, now_s: float) -> Grant | None:
        given = dataclasses.replace(grant, granted_at_s=now_s, lease_until_s=now_s + self.lease_s, fast=False)
        body = dataclasses.asdict(given)
        del body["token"]
        token = await self._run(
            "grant",
            [self._stage(grant.stage_id), self._ready(ticket.model)]
            + self._keys("leases", "clients", "slots", "kv", "credits", "epoch", "fence")
            + [self._inbox(ticket.client_id)],
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
        async with _reachable():
            found = await self._redis.hget(self._fixed["workflows"], workflow)
        return None if found is None else str(found)

    async def refuse(self, refusal: Refusal, ticket: Ticket, *, now_s: float) -> bool:
        del now_s
        body = json.dumps({"refusal": dataclasses.asdict(refusal)}, separators=(",", ":"))
        keys = [self._stage(ticket.stage_id), self._ready(ticket.model), self._inbox(ticket.client_id)]
        return bool(await self._run("refuse", keys, ticket.stage_id, body, math.ceil(4 * self.lease_s), RECORD_TTL_S))

    async def reap(self, *, now_s: float) -> Sequence[str]:
        async with _reachable():
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
            keys = [self._stage(stage_id), self._ready(model), *self._keys("leases", "clients", "draining")]
            if await self._run("lose", keys, stage_id, now_s, RECORD_TTL_S):
                lost.append(stage_id)
        if dead:
            async with _reachable():
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
        async with _reachable():
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
        async with _reachable():
            leases = await self._redis.zrange(self._fixed["leases"], 0, -1, withscores=True)
            pipe = self._redis.pipeline(transaction=False)
            for stage_id, _ in leases:
                pipe.hmget(self._stage(stage_id), "ticket", "engine", "token", "kv", "granted_at", "grant")
            rows = await pipe.execute()
        return [
            Running(
                ticket=Ticket.decode(ticket),
                engine_id=engine_id,
                token=int(token),
                kv_bytes=int(kv),
                granted_at_s=float(granted_at),
                lease_until_s=until,
                because=json.loads(grant or "{}").get("because", {}),
            )
            for (_, until), (ticket, engine_id, token, kv, granted_at, grant) in zip(leases, rows, strict=True)
            if ticket and engine_id
        ]

    async def ledger(self) -> Ledger:
        async with _reachable():
            pipe = self._redis.pipeline(transaction=True)
            pipe.hgetall(self._fixed["slots"])
            pipe.hgetall(self._fixed["kv"])
            slots, kv = await pipe.execute()
        return Ledger(
            slots={k: int(v) for k, v in slots.items() if int(v)}, kv_bytes={k: int(v) for k, v in kv.items() if int(v)}
        )

    async def depth(self, model: str) -> int:
        async with _reachable():
            return int(await self._redis.zcard(self._ready(model)))

    async def read_log(self, after: str, n: int) -> tuple[str, Sequence[Observation | RunEnd]]:
        async with _reachable():
            rows = await self._redis.xrange(self._fixed["log"], min=f"({after}" if after else "-", count=n)
        entries: list[Observation | RunEnd] = []
        for _, fields in rows:
            with contextlib.suppress(WireError, KeyError):  # one bad entry does not stop the reader
                entries.append(Observation.decode(fields["o"]) if "o" in fields else RunEnd.decode(fields["r"]))
        return (rows[-1][0] if rows else after), entries

    async def publish_model(self, version: str, *, card: str, data: bytes | None, epoch: int | None) -> bool:
        if data is not None and len(data) > MODEL_BYTES:
            raise ValueError(f"model {version} has {len(data)} bytes: {MODEL_BYTES} at most")
        file = ("0", "", "") if data is None else ("1", card, base64.b64encode(data).decode())
        ruled = -1 if epoch is None else epoch
        return bool(await self._run("publish_model", self._keys("epoch", "models"), ruled, version, MODELS_KEPT, *file))

    async def model(self, known: str) -> tuple[str, bytes] | None:
        async with _reachable():
            kept = str(await self._redis.hget(self._fixed["models"], "kept") or "").split()
            if not kept or kept[0] == known:
                return None
            data = await self._redis.hget(self._fixed["models"], f"file:{kept[0]}")
        try:
            return kept[0], base64.b64decode(data or "", validate=True)
        except ValueError:  # not by us: whoever decodes the model will say that it is none
            return kept[0], str(data).encode()

    async def models(self) -> Mapping[str, str]:
        async with _reachable():
            kept = str(await self._redis.hget(self._fixed["models"], "kept") or "").split()
            if not kept:
                return {}
            cards = await self._redis.hmget(self._fixed["models"], [f"card:{version}" for version in kept])
        return {version: card or "{}" for version, card in zip(kept, cards, strict=True)}

    async def set_predictor_status(self, status: str) -> None:
        async with _reachable():
            await self._redis.set(self._fixed["predictor"], status)

    async def predictor_status(self) -> str:
        async with _reachable():
            return str(await self._redis.get(self._fixed["predictor"]) or "")

    # -- the nodes' side ---------------------------------------------------------------------------------------------
    async def report(self, report: NodeReport, *, now_s: float, ttl_s: float) -> None:
        keys = self._keys("nodes", "reports", "wake")
        await self._run("report", keys, report.node_id, now_s, now_s + ttl_s, report.encode())

    async def reports(self, now_s: float) -> Sequence[NodeReport]:
        async with _reachable():
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
        async with _reachable():
            entries: list[tuple[str, Mapping[str, str]]] = await self._redis.xrevrange(key, count=1)
            if timeout_s > 0.0 and (not entries or entries[0][0] == known):
                block_ms = round(1000 * min(max(timeout_s, 0.01), BLOCK_LIMIT_S))
                read = await self._redis.xread({key: known if entries else "0"}, block=block_ms)
                entries = read[0][1] if read else []
        if not entries or entries[-1][0] == known:
            return None
        return entries[-1][0], Wanted.decode(entries[-1][1]["w"])

    async def incarnation(self) -> str:
        async with _reachable():
            try:
                return str((await self._redis.info("server"))["run_id"])
            except (ResponseError, KeyError):  # no INFO for this user, or a server without it
                return "unknown"

    async def server_time_s(self) -> float:
        """The server's clock, so that all clients agree on moments."""
        async with _reachable():
            seconds, micros = await self._redis.time()
        return seconds + micros / 1e6

    async def status(self, stage_id: str) -> Status | None:
        """The status of a stage, also of one that ended lately."""
        async with _reachable():
            found = await self._redis.hget(self._stage(stage_id), "status")
        return Status(found) if found else None

    async def close(self) -> None:
        if self._flushing is not None and not self._flushing.done():
            await asyncio.wait([self._flushing], timeout=COMMAND_TIMEOUT_S)
        with contextlib.suppress(RedisError, OSError):
            await self._redis.aclose()


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
    except (RedisError, OSError, TimeoutError) as e:
        raise _told(e) from e
    if task and task.cancelling() > cancelled:
        raise asyncio.CancelledError


def _told(error: Exception) -> Exception:
    """What a caller is told of an error of Redis."""
    if isinstance(error, ResponseError):
        if str(error).startswith(_NOT_READY):
            return QueueUnavailable(f"Redis is not ready: {error}")
        if str(error).startswith(_NOT_OURS):
            return QueueUnavailable(f"Redis does not do what Maestro needs ({error}). Run `maestro doctor`.")
        return error
    if isinstance(error, (RedisError, OSError, TimeoutError)):
        return QueueUnavailable(f"Redis does not answer ({type(error).__name__}: {error}). Run `maestro doctor`.")
    return error


_NOT_READY: Final = ("LOADING", "MASTERDOWN", "READONLY", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "OOM", "MISCONF")
"""A server that answers, but not with what was asked: waiting helps, or an operator must."""

_NOT_OURS: Final = ("unknown command", "NOPERM")
"""A server that is too old or something else, or a user who may not: an operator must."""


def _text(value: object) -> str:
    """A number as Lua's ``tonumber`` reads it, without losing digits."""
    return repr(value) if isinstance(value, float) else str(value)


def _verdict(message: str) -> Verdict:
    token, _, body = message.partition(" ")
    fields = json.loads(body)
    if "refusal" in fields:
        return Refusal(**fields["refusal"])
    return Grant(token=int(token), **fields)


def _switch(text: str | None) -> Switch:
    try:
        return Switch.decode(text)
    except WireError as e:
        return Switch(reason=f"not understood: {e}")


def _without_password(url: str) -> str:
    return re.sub(r"//[^@/]*@", "//***@", url)


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
