"""The gateway: what passes through it and what does not, whose run a call is, and what happens when something fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from maestro_agents.cli import main
from maestro_agents.core import Mode, ServiceClass, Status, Switch
from maestro_agents.errors import QueueFull, QuotaExceeded, StageRefused
from maestro_agents.queue.embedded import EmbeddedRedis
from maestro_agents.tenants import Tenant
from maestro_serving.emulator import listen, url_of
from maestro_serving.gateway import app as app_module
from maestro_serving.gateway import identity, server
from maestro_serving.gateway.relay import SCHEDULERS_ONLY, RefusedCall
from tests.front import Front, chat
from tests.stub_openai import StubServer, dead_url, fleet_toml, stub_servers

CANARY = "canary-8f3b5a"


def eventually(true: Any, within_s: float = 10.0) -> None:
    """Wait for something of another thread that gives no event."""
    give_up_at_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < give_up_at_s, "it did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def stubs() -> Iterator[list[StubServer]]:
    with stub_servers(2) as servers:
        yield servers


@pytest.fixture
def one(stubs: list[StubServer]) -> StubServer:
    stubs[0].reset()
    return stubs[0]


@pytest.fixture
def front(redis_url: str, pool: str, one: StubServer) -> Iterator[Front]:
    """A gateway in front of one engine."""
    with Front(redis_url, pool, {"a": one.url}) as made:
        yield made


# -- what passes -------------------------------------------------------------------------------------------------------
def test_a_stream_has_the_bytes_that_the_engine_would_have_sent_without_us(front: Front, one: StubServer) -> None:
    """Usage is asked for and hidden where the caller did not ask, and passes where it did."""
    for options in ({}, {"stream_options": {"include_usage": True}}):
        body = chat("some words to stream", stream=True, **options)
        with front.http() as http:
            through = http.post("/chat/completions", json=body)
        direct = httpx.post(f"{one.url}/chat/completions", json=body)
        assert through.content == direct.content
        assert through.headers["content-type"].startswith("text/event-stream")
        assert one.requests[-2].body["stream_options"]["include_usage"]
    assert [o.output_tokens for o in front.observations(2)] == [7, 7]
    assert not any(o.output_estimated for o in front.observations(2))


def test_nothing_of_the_caller_but_its_request_reaches_an_engine(front: Front, one: StubServer) -> None:
    """No header of its own, its key least of all; orders to vLLM's scheduler and caches are ours."""
    orders = dict.fromkeys(SCHEDULERS_ONLY, "x")
    body = chat(temperature=0.5, tools=[{"type": "function", "function": {"name": "f"}}], **orders)
    with front.http(cookie="a=b", **{"x-vllm-priority": "-9", "openai-organization": "org"}) as http:
        assert http.post("/chat/completions", json=body).status_code == 200
    seen = one.requests[-1]
    assert front.key not in json.dumps(seen.headers)
    assert not {"authorization", "cookie", "x-vllm-priority", "openai-organization"} & set(seen.headers)
    assert {k: seen.body[k] for k in ("temperature", "tools", "messages")} == {
        k: body[k] for k in ("temperature", "tools", "messages")
    }
    assert set(seen.body) == {"model", "messages", "temperature", "tools", "priority", "cache_salt"}
    assert isinstance(seen.body["priority"], int)


def test_tenants_have_prefix_caches_of_their_own(front: Front, one: StubServer) -> None:
    """The salt is a tenant's: the same for its calls, another for others, and not the one that a caller names."""
    other = front.add_key("other")
    for key in (front.key, front.key, other):
        with front.http(key) as http:
            http.post("/chat/completions", json=chat(cache_salt="mine"))
    first, second, third = (r.body["cache_salt"] for r in one.requests)
    assert first == second != third
    assert "mine" not in {first, third}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/completions", {"prompt": "once"}),
        ("/responses", {"input": "once"}),
        ("/embeddings", {"input": ["once", "twice"]}),
    ],
)
def test_all_calls_are_managed_alike(front: Front, one: StubServer, path: str, body: dict[str, Any]) -> None:
    """Each has a ticket, and the engine's answer comes back as it is."""
    with front.http() as http:
        through = http.post(path, json={"model": "stub", **body})
    assert through.status_code == 200
    assert through.json()["object"] in {"text_completion", "response", "list"}
    (seen,) = front.observations(1)
    assert (seen.tenant, seen.engine_id, seen.node) == ("acme", "a", path.strip("/"))
    assert ("cache_salt" in one.requests[-1].body) == (path != "/embeddings")


def test_a_responses_conversation_stays_with_its_engine_and_its_tenant(
    redis_url: str, pool: str, stubs: list[StubServer]
) -> None:
    """`previous_response_id` leads back to who answered; that of another tenant is not found."""
    for stub in stubs:
        stub.reset()
    with Front(redis_url, pool, {"a": stubs[0].url, "b": stubs[1].url}) as front:
        with front.http() as http:
            first = http.post("/responses", json={"model": "stub", "input": "one"}).json()["id"]
            asked = {"model": "stub", "input": "two", "previous_response_id": first}
            for _ in range(4):
                assert http.post("/responses", json=asked).status_code == 200
        with front.http(front.add_key("other")) as http:
            refused = http.post("/responses", json=asked)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "previous_response_not_found")
        engines = {o.engine_id for o in front.observations(5)}
        assert len(engines) == 1
        assert len({o.run_id for o in front.observations(5)}) == 1


# -- whose run ---------------------------------------------------------------------------------------------------------
def test_headers_say_whose_run_a_call_is(front: Front) -> None:
    """Run, role, class, deadline and workflow; names are the tenant's own, and the run's clock is its first call's."""
    said = {
        "x-maestro-run": "r1",
        "x-maestro-role": "triage",
        "x-maestro-class": "batch",
        "x-maestro-deadline-s": "90",
        "x-maestro-workflow": "support",
    }
    with front.http(**said) as http:
        answer = http.post("/chat/completions", json=chat("one"))
        http.post("/chat/completions", json=chat("two"), headers={"x-maestro-run-end": "done"})
    first, second = front.observations(2)
    assert answer.headers["x-maestro-run"] == "r1"
    assert (first.run_id, first.role, first.workflow) == ("acme/r1", "acme/triage", "acme/support")
    assert first.service_class is ServiceClass.BATCH
    assert first.deadline_at_s == pytest.approx(first.run_started_at_s + 90)
    assert (second.run_started_at_s, second.deadline_at_s) == (first.run_started_at_s, first.deadline_at_s)
    assert [(o.visit, o.step) for o in (first, second)] == [(0, 0), (1, 1)]
    (end,) = front.ends(1)
    assert (end.run_id, end.outcome, end.tenant, dict(end.calls)) == ("acme/r1", "done", "acme", {"triage": 2})
    assert set(end.moves) == {("__start__", "triage", 1), ("triage", "triage", 1), ("triage", "__end__", 1)}


def test_a_key_says_the_tenant_and_nothing_else_does(front: Front) -> None:
    """What a body or a header says of a tenant is not believed."""
    with front.http(**{"x-maestro-tenant": "root", "x-llm-d-inference-fairness-id": "root"}) as http:
        http.post("/chat/completions", json=chat(user="root"))
    assert front.observations(1)[0].tenant == "acme"


def test_a_conversation_that_goes_on_is_one_run(front: Front) -> None:
    """Without any header: tool loops are one run, another conversation is another, and so is another tenant's."""
    talk: list[dict[str, Any]] = [{"role": "system", "content": "You help."}, {"role": "user", "content": "one"}]
    longer = [*talk, {"role": "assistant", "content": "answer"}, {"role": "tool", "content": "42"}]
    other = [talk[0], {"role": "user", "content": "other"}]
    with front.http() as http:
        for messages in (talk, longer, other, [*longer, {"role": "assistant", "content": "so"}, talk[1]], talk):
            assert http.post("/chat/completions", json={"model": "stub", "messages": messages}).status_code == 200
    with front.http(front.add_key("other")) as http:
        http.post("/chat/completions", json={"model": "stub", "messages": longer})
    runs = [o.run_id for o in front.observations(6)]
    assert runs[0] == runs[1] == runs[3]
    assert len({runs[0], runs[2], runs[4], runs[5]}) == 4
    assert [o.step for o in front.observations(6)] == [0, 1, 0, 2, 0, 0]


def test_two_conversations_that_begin_alike_stay_two(front: Front) -> None:
    """Each answer is gone on with once: the second continuation belongs to the second conversation."""
    talk = chat("same")["messages"]
    longer = [[*talk, {"role": "assistant", "content": a}, {"role": "user", "content": "on"}] for a in "xy"]
    with front.http() as http:
        for messages in (talk, talk, *longer):
            http.post("/chat/completions", json={"model": "stub", "messages": messages})
    runs = [o.run_id for o in front.observations(4)]
    assert runs[0] != runs[1]
    assert runs[2:] == runs[:2]


def test_a_person_who_thinks_does_not_spend_the_deadline(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation that its user goes on with later has its whole deadline again; a program's tool loop has not."""
    monkeypatch.setattr(identity, "PERSON_S", 0.0)
    talk = chat("one")["messages"]
    tool = [*talk, {"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]
    person = [*tool, {"role": "assistant", "content": "a"}, {"role": "user", "content": "two"}]
    with front.http() as http:
        for messages in (talk, tool, person):
            http.post("/chat/completions", json={"model": "stub", "messages": messages})
    first, second, third = front.observations(3)
    assert first.deadline_at_s == second.deadline_at_s < third.deadline_at_s
    assert len({o.run_id for o in (first, second, third)}) == 1


def test_a_run_that_nobody_ends_is_paused_when_it_is_idle(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """It teaches nothing about how long runs take, and is not remembered for ever."""
    monkeypatch.setattr(identity, "IDLE_S", 0.0)
    with front.http() as http:
        http.post("/chat/completions", json=chat("one"))

    async def sweep() -> int:
        front.gateway.relay.runs.end_idle()
        return len(front.gateway.relay.runs)

    front.observations(1)
    assert front.ask(sweep()) == 0
    (end,) = front.ends(1)
    assert (end.outcome, end.tasks) == ("paused", {})


# -- who may what ------------------------------------------------------------------------------------------------------
def error_of(response: httpx.Response) -> tuple[int, str, str]:
    """Status, code and message of an error in OpenAI's shape."""
    said = response.json()["error"]
    assert set(said) == {"message", "type", "param", "code"}
    assert CANARY not in response.text
    return response.status_code, said["code"], said["message"]


def test_wrong_requests_are_told_in_openais_shape(front: Front, one: StubServer) -> None:
    """Key, model, body, path, method: each with its status and code, one clear line, and never what was asked."""
    no_model = {"messages": [{"role": "user", "content": CANARY}]}
    with front.http() as http, front.http("") as nobody, front.http("mk-wrong") as stranger:
        assert error_of(nobody.post("/chat/completions", json=chat()))[:2] == (401, "invalid_api_key")
        assert error_of(stranger.get("/models"))[:2] == (401, "invalid_api_key")
        unknown = error_of(http.post("/chat/completions", json=chat(CANARY, model="gpt-4")))
        assert unknown == (404, "model_not_found", "The model 'gpt-4' does not exist or you do not have access to it.")
        assert error_of(http.get("/models/gpt-4"))[:2] == (404, "model_not_found")
        assert error_of(http.post("/chat/completions", json=no_model))[:2] == (400, "missing_model")
        for broken in (f'{{"x": "{CANARY}', "[" * 200_000, "[1]", "null", b"\xff"):
            assert error_of(http.post("/chat/completions", content=broken))[:2] == (400, "invalid_json")
        zipped = http.post("/chat/completions", content=b"x", headers={"content-encoding": "gzip"})
        assert error_of(zipped)[:2] == (415, "unsupported_encoding")
        assert error_of(http.post("/responses", json={"model": "stub", "background": True}))[0] == 400
        status, code, told = error_of(http.post(f"{front.url[:-3]}/chat/completions", json=chat()))
        assert (status, code) == (404, "not_found")
        assert "Try /v1/chat/completions" in told
        assert error_of(http.get("/chat/completions"))[:2] == (405, "method_not_allowed")
        assert error_of(http.post("/sleep"))[:2] == (404, "not_found")
    assert one.requests == []


def test_a_body_that_is_too_large_is_refused_before_it_is_kept(redis_url: str, pool: str, one: StubServer) -> None:
    """413, whether or not its length is told; one of the allowed size passes."""
    with Front(redis_url, pool, {"a": one.url}, max_body_bytes=10_000) as front, front.http() as http:
        assert http.post("/chat/completions", json=chat("x" * 9_000)).status_code == 200
        large = json.dumps(chat("x" * 12_000)).encode()
        assert error_of(http.post("/chat/completions", content=large))[:2] == (413, "request_too_large")
        pieces = (large[i : i + 1000] for i in range(0, len(large), 1000))
        assert error_of(http.post("/chat/completions", content=pieces))[:2] == (413, "request_too_large")
    assert len(one.requests) == 1


def test_a_tenant_sees_and_reaches_only_its_models(redis_url: str, pool: str, one: StubServer) -> None:
    """A model whose engines are all closed to it is not there, neither in the list nor by name."""
    with Front(redis_url, pool, {"a": one.url}, tenants=[Tenant(name="eu", allow_clusters=("eu",))]) as front:
        with front.http() as http:
            assert [m["id"] for m in http.get("/models").json()["data"]] == ["stub"]
            assert http.get("/models/stub").json()["object"] == "model"
        with front.http(front.add_key("eu")) as http:
            assert http.get("/models").json()["data"] == []
            assert error_of(http.post("/chat/completions", json=chat()))[:2] == (404, "model_not_found")
    assert one.requests == []


def test_keys_count_within_seconds_and_hold_while_redis_is_away(one: StubServer) -> None:
    """A new key, a removed one, and the last known ones when nobody can be asked."""
    with EmbeddedRedis() as redis:
        assert redis.url
        with Front(redis.url, "p", {"a": one.url}) as front:
            from maestro_serving.gateway import keys

            async def swap() -> str:
                key, _ = await keys.add(front.queue, "late")
                await keys.remove(front.queue, keys.digest_of(front.key)[: keys.ID_CHARS])
                return key

            new = front.ask(swap())
            with front.http() as old, front.http(new) as late:
                eventually(lambda: old.get("/models").status_code == 401)
                assert late.get("/models").status_code == 200
                redis.stop()
                assert late.get("/models").status_code == 200
                assert old.get("/models").status_code == 401
                health = httpx.get(f"{front.url[:-3]}/health")
                assert health.status_code == 200
                answer = late.post("/chat/completions", json=chat(), timeout=30)
                assert answer.status_code == 200


def test_a_closed_gateway_without_redis_says_to_come_back_later(one: StubServer) -> None:
    """MAESTRO_ON_OUTAGE=closed, or =original_url, which no caller of a gateway has: 503 with Retry-After."""
    for then in ("closed", "original_url"):
        with EmbeddedRedis() as redis:
            assert redis.url
            settings = {"on_outage": then, "outage_after_s": 0.5}
            with Front(redis.url, "p", {"a": one.url}, settings=settings) as front, front.http() as http:
                redis.stop()
                refused = http.post("/chat/completions", json=chat(CANARY))
                assert error_of(refused)[:2] == (503, "unavailable")
                assert int(refused.headers["retry-after"]) >= 1
    assert one.requests == []


def test_browsers_of_other_origins_may_not_call_unless_they_are_named(
    redis_url: str, pool: str, one: StubServer
) -> None:
    """No CORS header by default; with `--cors` for that origin alone."""
    asks = {"origin": "https://app.example", "access-control-request-method": "POST"}
    with Front(redis_url, pool, {"a": one.url}) as front, front.http(**asks) as http:
        assert "access-control-allow-origin" not in http.post("/chat/completions", json=chat()).headers
        assert http.options("/chat/completions").status_code == 405
    with Front(redis_url, f"{pool}2", {"a": one.url}, cors=("https://app.example",)) as front:
        with front.http(**asks) as http:
            allowed = http.post("/chat/completions", json=chat()).headers["access-control-allow-origin"]
            assert allowed == "https://app.example"
            assert http.options("/chat/completions").status_code == 200
        with front.http(origin="https://evil.example") as http:
            assert "access-control-allow-origin" not in http.post("/chat/completions", json=chat()).headers


# -- when something fails ----------------------------------------------------------------------------------------------
def test_a_call_moves_on_before_its_first_byte(redis_url: str, pool: str, stubs: list[StubServer]) -> None:
    """An engine that is gone, busy, broken, or dies before a word costs the caller nothing."""
    for stub in stubs:
        stub.reset()
    stubs[0].fail(503, 429, 500)
    stubs[0].deaths = 1
    with Front(redis_url, pool, {"a": stubs[0].url, "dead": dead_url()}) as front, front.http() as http:
        for _ in range(2):
            assert http.post("/chat/completions", json=chat(stream=True)).status_code == 200
        eventually(front.idle)
    assert len(stubs[0].requests) >= 4


def test_an_error_that_stays_is_told_without_its_inside(front: Front, one: StubServer) -> None:
    """An engine that keeps failing: 502; its refusal of a request: as it said it; a wrong key of ours is no 401."""
    with front.http() as http:
        one.fail(500, 500, 500)
        assert error_of(http.post("/chat/completions", json=chat(CANARY)))[:2] == (502, "engine_failed")
        one.fail(400)
        assert error_of(http.post("/chat/completions", json=chat()))[2] == "stub says 400"
        one.fail(401)
        assert error_of(http.post("/chat/completions", json=chat()))[:2] == (502, "engine_failed")
        one.fail(404)
        assert error_of(http.post("/chat/completions", json=chat()))[:2] == (400, "unsupported_path")
    eventually(front.idle)
    assert {o.status for o in front.observations(4)} == {Status.FAILED}


def test_an_answer_that_breaks_off_is_an_error_and_not_an_end(front: Front) -> None:
    """Once its first byte is out nothing is replayed: the stream ends with an error event, without [DONE]."""
    with front.http() as http:
        answer = http.post("/chat/completions", json=chat("[[die=3]] a b c d", stream=True))
    events = answer.text.strip().split("\n\n")
    assert "error" in json.loads(events[-1].removeprefix("data: "))
    assert "[DONE]" not in answer.text
    eventually(front.idle)


def test_who_leaves_takes_the_call_along(redis_url: str, pool: str, one: StubServer) -> None:
    """A caller that disconnects while it reads or while it waits: the engine sees it, and nothing stays reserved."""
    with Front(redis_url, pool, {"a": one.url}, slots=1) as front:
        with (
            front.http() as http,
            http.stream("POST", "/chat/completions", json=chat("[[hold]]", stream=True)) as reads,
        ):
            next(reads.iter_bytes())
            with contextlib.suppress(httpx.ReadTimeout):
                http.post("/chat/completions", json=chat("waits"), timeout=0.5)
        one.wait(lambda s: s.requests[0].gone)
        eventually(front.idle)
        with front.http() as http:
            assert http.post("/chat/completions", json=chat("after")).status_code == 200
    assert [r.body["messages"][0]["content"] for r in one.requests] == ["[[hold]]", "after"]


def test_a_full_queue_is_told_at_once(redis_url: str, pool: str, one: StubServer) -> None:
    """429 with Retry-After: whoever calls waits at home."""
    settings = {"max_queue": 1}
    with Front(redis_url, pool, {"a": one.url}, slots=1, settings=settings) as front:
        with (
            front.http() as http,
            http.stream("POST", "/chat/completions", json=chat("[[hold]]", stream=True)) as reads,
        ):
            next(reads.iter_bytes())
            waiter = threading.Thread(target=lambda: front.openai().chat.completions.create(**chat("second")))
            waiter.start()
            eventually(lambda: len(front.gateway.client._room.waiting) == 1)
            refused = http.post("/chat/completions", json=chat("third"))
            assert error_of(refused)[:2] == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            one.release()
            waiter.join(10)
    assert len(one.requests) == 2


@pytest.mark.parametrize("mode", [Mode.OBSERVE, Mode.OFF])
def test_the_switch_turns_ordering_off_and_not_the_service(front: Front, one: StubServer, mode: Mode) -> None:
    """With the pool's brake pulled calls go straight to the engine with the fewest of ours."""
    front.ask(front.queue.set_switch(Switch(mode=mode, by="test")))
    eventually(lambda: front.gateway.client.mode is mode)
    with front.http() as http:
        one.fail(500)
        assert http.post("/chat/completions", json=chat()).status_code in {200, 502}
        assert http.post("/chat/completions", json=chat(stream=True)).status_code == 200
    assert not any(front.gateway.relay.unplaced.values())
    eventually(front.idle)


# -- slow ones ---------------------------------------------------------------------------------------------------------
class Flood:
    """An engine that streams far more than anybody reads, and counts what it could send."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.gone = threading.Event()
        listener = listen("127.0.0.1", 0)
        self.url = url_of(listener)
        route = Route("/v1/chat/completions", self._chat, methods=["POST"])
        config = uvicorn.Config(Starlette(routes=[route]), log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: self._server.run(sockets=[listener]), daemon=True)
        self._thread.start()

    async def _chat(self, request: Request) -> StreamingResponse:
        async def events() -> AsyncIterator[bytes]:
            chunk = b'data: {"choices": [{"index": 0, "delta": {"content": "' + b"x" * 60_000 + b'"}}]}\n\n'
            try:
                while True:
                    yield chunk
                    self.sent_bytes += len(chunk)
                    await asyncio.sleep(0)  # or its server, whose client is gone, never hears of it
            finally:
                self.gone.set()

        return StreamingResponse(events(), media_type="text/event-stream")

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(5)


def test_a_reader_that_stalls_holds_no_memory_and_is_cut_off(redis_url: str, pool: str) -> None:
    """What it does not read is not read from the engine either; after a while the connection and the engine's work end."""
    flood = Flood()
    try:
        with Front(redis_url, pool, {"a": flood.url}, stall_s=1.0) as front:
            host, port = front.url.removeprefix("http://").removesuffix("/v1").split(":")
            body = json.dumps(chat(stream=True)).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.key}\r\n"
            with socket.create_connection((host, int(port))) as stalled:
                stalled.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                assert stalled.recv(100).startswith(b"HTTP/1.1 200")
                assert flood.gone.wait(15)
                eventually(front.idle)
                assert flood.sent_bytes < 40 << 20
                eventually(lambda: not front._server.server_state.connections)
    finally:
        flood.stop()


def test_a_connection_that_says_nothing_is_closed(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither silence nor half a head holds a connection for ever."""
    monkeypatch.setattr(server, "HEADER_S", 0.3)
    host, port = front.url.removeprefix("http://").removesuffix("/v1").split(":")
    for said in (b"", b"GET /health HTTP/1.1\r\nhost:"):
        with socket.create_connection((host, int(port)), 10) as silent:
            silent.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                assert silent.recv(100) == b""
    monkeypatch.setattr(app_module, "BODY_S", 0.3)
    with socket.create_connection((host, int(port)), 10) as slow:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {front.key}\r\n"
        slow.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


# -- what is told ------------------------------------------------------------------------------------------------------
def test_nothing_that_was_asked_is_logged_or_counted(
    front: Front, one: StubServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in an error, not in a log line, a bug of ours included, not in metrics, not in Redis."""
    caplog.set_level(logging.DEBUG)
    with front.http() as http:
        http.post("/chat/completions", json=chat(CANARY, stream=True))
        one.fail(400, 500, 500, 500)
        http.post("/chat/completions", json=chat(CANARY))
        http.post("/chat/completions", json=chat(CANARY))
        relay = front.gateway.relay
        relay.models_of = lambda tenant: 1 / 0  # type: ignore[method-assign,assignment]
        assert error_of(http.post("/chat/completions", json=chat(CANARY)))[:2] == (500, "internal_error")
        del relay.models_of
        page = httpx.get(f"{front.url[:-3]}/metrics").text
    assert 'maestro_gateway_calls_total{path="/chat/completions",status="200"} 1.0' in page
    assert "maestro_gateway_open_calls 0.0" in page
    assert "acme" not in page
    assert CANARY not in page
    assert CANARY not in caplog.text
    assert "ZeroDivisionError at" in caplog.text
    assert CANARY not in repr(front.observations(3))


# -- the command -------------------------------------------------------------------------------------------------------
def test_the_page_names_what_is_not_sent_and_the_headers_that_are_read() -> None:
    """docs/gateway.md is about this gateway."""
    page = (Path(__file__).parent.parent / "docs" / "gateway.md").read_text()
    read = ("run", "role", "class", "deadline-s", "workflow", "run-end")
    assert not [name for name in (*SCHEDULERS_ONLY, *(f"x-maestro-{n}" for n in read)) if f"`{name}`" not in page]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gateway"], "which Redis? Give --redis-url or MAESTRO_REDIS_URL"),
        (["gateway", "--no-keys"], "MAESTRO_FLEET=fleet.toml maestro gateway --no-keys"),
        (["gateway", "--no-keys", "--host", "0.0.0.0"], "--no-keys lets everybody in who reaches 0.0.0.0"),
        (["gateway", "--no-keys", "--host", "gw.example"], "--no-keys lets everybody in"),
        (["gateway", "--redis-url", "redis://127.0.0.1:1/0"], "does not answer"),
        (["gateway", "keys", "add", "acme"], "which Redis?"),
        (["gateway", "keys", "ls", "--redis-url", "redis://127.0.0.1:1/0"], "does not answer"),
    ],
)
def test_wrong_use_is_one_clear_line(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    """No traceback: what is wrong, and what to do."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert says in err
    assert err.count("\n") == 1


def test_keys_are_made_shown_once_listed_and_removed(
    redis_url: str, pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key itself is printed by `add` alone, and Redis never has it."""

    def said(*words: str) -> str:
        with pytest.raises(SystemExit):
            main(["gateway", "keys", *words, "--redis-url", redis_url, "--pool", pool])
        return capsys.readouterr().out

    made = json.loads(said("add", "acme", "--label", "ci", "--json"))
    assert made["key"].startswith("mk-")
    assert len(made["key"]) >= 43
    listed = said("ls", "--json")
    assert [(k["id"], k["tenant"], k["label"]) for k in json.loads(listed)] == [(made["id"], "acme", "ci")]
    assert made["key"] not in listed
    assert "counts no more" in said("rm", made["id"])
    assert json.loads(said("ls", "--json")) == []


def test_sigterm_lets_streams_end_and_takes_no_new_call(tmp_path: Path, one: StubServer) -> None:
    """The whole command, without keys and without Redis: a stream that runs comes to its end, then the process ends well."""
    (tmp_path / "fleet.toml").write_text(fleet_toml({"a": one.url}))
    command = [sys.executable, "-m", "maestro_agents.cli", "gateway", "--no-keys", "--port", "0"]
    env = {**os.environ, "MAESTRO_FLEET": str(tmp_path / "fleet.toml")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout
        url = process.stdout.readline().split(" at ")[1].split()[0]
        body = chat("[[hold]] words", stream=True)
        with httpx.Client(timeout=20) as http, http.stream("POST", f"{url}/chat/completions", json=body) as reads:
            chunks = reads.iter_bytes()
            got = next(chunks)
            process.send_signal(signal.SIGTERM)
            eventually(lambda: _refuses(url))
            one.release()
            got += b"".join(chunks)
        assert b"[DONE]" in got
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait(5)


@pytest.mark.slow
def test_workers_share_a_port_and_end_together(redis_url: str, pool: str, front: Front) -> None:
    """`--workers 2`: each has a client of its own, the same key opens both, SIGTERM ends all."""
    words = ["gateway", "--port", "0", "--workers", "2", "--redis-url", redis_url, "--pool", pool]
    command = [sys.executable, "-m", "maestro_agents.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout
        url = process.stdout.readline().split(" at ")[1].split()[0]
        seen: set[str] = set()

        def both_answered() -> bool:
            with httpx.Client(timeout=60, headers={"authorization": f"Bearer {front.key}"}) as http:
                answer = http.post(f"{url}/chat/completions", json=chat())
            assert answer.status_code == 200, answer.text
            seen.add(answer.headers["x-maestro-run"].partition("-")[0])
            return len(seen) == 2

        eventually(both_answered, within_s=60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        eventually(lambda: _refuses(url))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(5)


def _refuses(url: str) -> bool:
    try:
        httpx.get(f"{url[:-3]}/health", timeout=5)
    except httpx.TransportError:
        return True
    return False


@pytest.mark.parametrize(
    ("kind", "code"),
    [(QueueFull, "queue_full"), (QuotaExceeded, "quota_exceeded"), (StageRefused, "stage_refused")],
)
def test_what_may_be_tried_again_says_which_and_when(kind: Any, code: str) -> None:
    """429, with its own code and the moment that the queue gave."""
    found = RefusedCall.of(kind("Try again later.", retry_after_s=3.5))
    assert (found.status, found.body["error"]["code"], found.retry_after_s) == (429, code, 3.5)
