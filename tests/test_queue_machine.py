"""A random walk over the queue: whatever is said, in whatever order, Redis answers as the specification does."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from maestro_agents.core import EngineSpec, Grant, Observation, Refusal, ServiceClass, Status, Ticket
from maestro_agents.nodes import NodeReport, Tier, Want, Wanted
from maestro_agents.ports import Backlog
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.tenants import Tenant
from tests.queues import fake_redis_queue, fresh_redis_queue

ENGINES = (
    EngineSpec(engine_id="a", url="http://127.0.0.1:1/v1", model="m", slots=2, kv_bytes=500, kv_bytes_per_token=1),
    EngineSpec(
        engine_id="b", url="http://127.0.0.1:2/v1", model="m", slots=1, kv_bytes=0, kv_bytes_per_token=3,
        kv_block_tokens=16, kv_window_tokens=100, kv_window_bytes_per_token=2, max_model_len=310,
    ),
)  # fmt: skip
TENANTS = (Tenant(name="metered", max_stages=1, max_waiting=2), Tenant(name="default", weight=2.0, max_waiting=2))
LEASE_S = 10.0
STAGES = st.sampled_from([f"s{i}" for i in range(6)])
CLIENTS = st.sampled_from(["app1", "app2"])
OTHERS = st.sampled_from([None, None, None, "app1", "app2"])
PLACES = st.sampled_from(["a", "b"])


class Walk(RuleBasedStateMachine):
    """Says the same to both queues and compares answers, then everything that can be looked at."""

    redis_url = ""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.spec = MemoryQueue(lease_s=LEASE_S, max_queue=4)
        self.real: RedisQueue = self._made()
        self.now_s = 1_790_000_000.0
        self.epoch = 0
        self.tokens: dict[str, int] = {}
        self.tickets: dict[str, Ticket] = {}

    def _made(self) -> RedisQueue:
        return fake_redis_queue(lease_s=LEASE_S, max_queue=4)

    def both(self, command: str, *args: Any, **kwargs: Any) -> Any:
        expected = self.loop.run_until_complete(getattr(self.spec, command)(*args, **kwargs))
        actual = self.loop.run_until_complete(getattr(self.real, command)(*args, **kwargs))
        normal = sorted if command == "reap" else (lambda x: tuple(x) if isinstance(x, list) else x)
        assert normal(actual) == normal(expected), (command, args, kwargs)
        return expected

    @initialize()
    def begin(self) -> None:
        self.take_the_lead("one", credit=True)

    @rule(holder=st.sampled_from(["one", "two"]), credit=st.booleans())
    def take_the_lead(self, holder: str, credit: bool) -> None:
        epoch = self.both("lead", holder, ttl_s=5.0, now_s=self.now_s)
        if epoch is not None:
            self.epoch = epoch
            until = self.now_s + 30 if credit else 0.0
            backlog = Backlog(models={"m": 7.0}, tenants={"metered": 9.0})
            self.both(
                "publish",
                ENGINES,
                p99={"m|r": 30.0},
                epoch=epoch,
                valid_until_s=until,
                tenants=TENANTS,
                backlog=backlog,
            )

    @rule(seconds=st.sampled_from([0.5, 4.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(stage=STAGES, client=CLIENTS, due=st.integers(-5, 5), tokens=st.sampled_from([10, 300]), nested=st.booleans())
    def push(self, stage: str, client: str, due: int, tokens: int, nested: bool) -> None:
        ticket = Ticket(
            stage_id=stage, client_id=client, model="m", role="r", prompt_tokens=tokens, due_at_s=self.now_s + due,
            nested=nested, max_tokens=None if due > 0 else 20, choices=1 + due % 2,
            tenant="metered" if stage in {"s0", "s1", "s2"} else "default",
        )  # fmt: skip
        self.tickets.setdefault(stage, ticket)
        ticket = self.tickets[stage].evolve(client_id=client)
        verdict = self.both("push", ticket, engines=ENGINES, now_s=self.now_s)
        if isinstance(verdict, Grant):
            self.tokens[stage] = verdict.token

    @rule(stage=STAGES, engine=PLACES, kv=st.sampled_from([50, 400]), stale=st.booleans())
    def grant(self, stage: str, engine: str, kv: int, stale: bool) -> None:
        ticket = self.tickets.get(stage)
        if ticket is None:
            return
        wish = Grant(
            stage_id=stage, engine_id=engine, token=0, epoch=self.epoch - stale, kv_bytes=kv, output_tokens=kv // 2,
            because={"decode_s": 0.25},
        )  # fmt: skip
        given = self.both("grant", wish, ticket, now_s=self.now_s)
        if given is not None:
            self.tokens[stage] = given.token

    def holder(self, stage: str, other: str | None) -> str:
        """Whose word it is: the holder's, or that of a client that may be another."""
        return other or (self.tickets[stage].client_id if stage in self.tickets else "nobody")

    @rule(stage=STAGES, failed=st.booleans(), wrong=st.booleans(), other=OTHERS)
    def finish(self, stage: str, failed: bool, wrong: bool, other: str | None) -> None:
        observation = Observation(
            stage_id=stage, run_id="run", workflow="w", role="r", node="n", model="m", engine_id="a", tenant="t",
            service_class=ServiceClass.BATCH, status=Status.FAILED if failed else Status.DONE, output_tokens=3,
        )  # fmt: skip
        token, client_id = self.tokens.get(stage, 0) + wrong, self.holder(stage, other)
        self.both("finish", observation, client_id=client_id, token=token, now_s=self.now_s)

    @rule(stage=STAGES, draining=st.booleans(), wrong=st.booleans(), other=OTHERS)
    def requeue(self, stage: str, draining: bool, wrong: bool, other: str | None) -> None:
        ticket = self.tickets.get(stage)
        if ticket is not None:
            ticket = ticket.evolve(client_id=self.holder(stage, other))
            token = self.tokens.get(stage, 0) + wrong
            self.both("requeue", ticket, token=token, now_s=self.now_s, draining=draining)

    @rule(kv_bytes=st.sampled_from([1, 120, 450, 600]), wrong=st.sampled_from([0, 0, 0, 1]), other=OTHERS)
    def extend_all(self, kv_bytes: int, wrong: int, other: str | None) -> None:
        for stage, token in self.tokens.items():
            client_id = self.holder(stage, other)
            self.both("extend", stage, client_id=client_id, token=token + wrong, kv_bytes=kv_bytes)

    @rule(stage=STAGES, draining=st.booleans(), other=OTHERS, operator=st.booleans())
    def cancel(self, stage: str, draining: bool, other: str | None, operator: bool) -> None:
        client_id = None if operator else self.holder(stage, other)
        self.both("cancel", stage, "m", client_id=client_id, now_s=self.now_s, draining=draining)

    @rule(stage=STAGES)
    def refuse(self, stage: str) -> None:
        if stage in self.tickets:
            refusal = Refusal(stage_id=stage, reason="deadline", retry_after_s=1.5)
            self.both("refuse", refusal, self.tickets[stage], now_s=self.now_s)

    @rule(client=CLIENTS, waiting=st.sets(STAGES), held=st.sets(STAGES))
    def renew(self, client: str, waiting: set[str], held: set[str]) -> None:
        stages = dict.fromkeys(sorted(waiting), 0) | {s: self.tokens.get(s, 7) for s in sorted(held)}
        self.both("renew", client, stages, now_s=self.now_s)

    @rule(stage=STAGES, granted=st.booleans())
    def announce(self, stage: str, granted: bool) -> None:
        ticket = self.tickets.setdefault(
            stage, Ticket(stage_id=stage, client_id="app1", model="m", role="r", due_at_s=self.now_s)
        )
        grant = Grant(stage_id=stage, engine_id="b", token=1000, epoch=1, kv_bytes=5, granted_at_s=self.now_s)
        self.both("announce", ticket, grant if granted else None, now_s=self.now_s)
        if granted and self.spec.status(stage) is Status.GRANTED:
            self.tokens.setdefault(stage, 1000)

    @rule(client=CLIENTS)
    def read_the_inbox(self, client: str) -> None:
        self.both("verdicts", client, 0.001)

    @rule()
    def reap(self) -> None:
        self.both("reap", now_s=self.now_s)

    @rule(node=st.sampled_from(["n", "o"]), tier=st.sampled_from(["gpu", "sleeping"]), stale=st.booleans())
    def want(self, node: str, tier: Tier, stale: bool) -> None:
        before = self.both_wanted(node)
        wanted = Wanted(epoch=self.epoch - stale, engines={"a": Want(tier=tier)})
        self.both("want", node, wanted)
        after = self.both_wanted(node)
        assert after == (before if stale else wanted)

    def both_wanted(self, node: str) -> Wanted | None:
        found = [
            self.loop.run_until_complete(queue.wanted(node, known="", timeout_s=0.0))
            for queue in (self.spec, self.real)
        ]
        assert [f and f[1] for f in found] == [found[0] and found[0][1]] * 2
        return found[0][1] if found[0] else None

    @rule(node=st.sampled_from(["n", "o"]))
    def report(self, node: str) -> None:
        self.both("report", NodeReport(node_id=node, at_s=self.now_s), now_s=self.now_s, ttl_s=5.0)
        self.both("reports", self.now_s)

    @rule()
    def settle_one(self) -> None:
        left = self.loop.run_until_complete(self.spec.draining())
        if left:
            self.both("settle", left[0])

    @invariant()
    def both_look_the_same(self) -> None:
        ledger = self.both("ledger")
        self.both("heads", "m", 10)
        self.both("heads", "m", 1, at_most={"metered": 1})
        self.both("waiting", ["metered", "default", "nobody"])
        self.both("depth", "m")
        for stage in self.tickets:
            expected = self.spec.status(stage)
            assert self.loop.run_until_complete(self.real.status(stage)) == expected, stage
        key = lambda r: r.stage_id if hasattr(r, "stage_id") else r.ticket.stage_id  # noqa: E731
        for look in ("draining", "running"):
            expected_rows = sorted(self.loop.run_until_complete(getattr(self.spec, look)()), key=key)
            actual_rows = sorted(self.loop.run_until_complete(getattr(self.real, look)()), key=key)
            assert actual_rows == expected_rows
        # The law that admission rests on: what is reserved is the sum over granted and draining stages, no more.
        held = self.loop.run_until_complete(self.spec.running())
        draining = self.loop.run_until_complete(self.spec.draining())
        assert sum(ledger.slots.values()) == len(held) + len(draining)
        assert sum(ledger.kv_bytes.values()) == sum(r.kv_bytes for r in (*held, *draining))
        assert all(v > 0 for v in ledger.slots.values())

    def teardown(self) -> None:
        self.loop.run_until_complete(self.real.close())
        self.loop.close()


BUDGET = {"deadline": None, "suppress_health_check": list(HealthCheck), "stateful_step_count": 40}


def test_redis_emulated_keeps_every_promise_of_the_specification() -> None:
    """40 steps at random, 40 times: fakeredis and memory never differ."""
    run_state_machine_as_test(Walk, settings=settings(max_examples=40, **BUDGET))  # type: ignore[arg-type]


def test_redis_keeps_every_promise_of_the_specification(redis_url: str) -> None:
    """40 steps at random, 40 times: a real Redis and memory never differ."""

    class RealWalk(Walk):
        def _made(self) -> RedisQueue:
            return self.loop.run_until_complete(fresh_redis_queue(redis_url, lease_s=LEASE_S, max_queue=4))

    run_state_machine_as_test(RealWalk, settings=settings(max_examples=40, **BUDGET))  # type: ignore[arg-type]
