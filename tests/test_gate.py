"""The gate: who passes, who waits, where calls go, and what happens when something breaks."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import openai._base_client as sdk
import pytest
from openai._models import FinalRequestOptions

from maestro_agents.client import Client, Pass
from maestro_agents.core import EngineSpec, Status
from maestro_agents.errors import (
    MaestroError,
    NoEngineFits,
    QueueFull,
    QueueUnavailable,
    QuotaExceeded,
    StageRefused,
    WaitTooLong,
)
from maestro_agents.usage import Usage, Watcher
from maestro_langgraph import call, engines, gate, maestro, quiet
from maestro_langgraph.refusals import as_sdk_error, httpx_of
from tests.stub_openai import (
    StubServer,
    dead_url,
    held,
    managed,
    stub_servers,
    until,
    waiting,
    watched_observations,
)

on_module_loop = pytest.mark.asyncio(loop_scope="module")
CANARY = "canary-4711"


@pytest.fixture(scope="module")
def servers() -> Iterator[list[StubServer]]:
    """The caller's own provider, and two engines."""
    with stub_servers(3) as servers:
        yield servers


@pytest.fixture(autouse=True)
def fresh(servers: list[StubServer]) -> None:
    """Nothing of the test before: not on the servers, and not among what was warned of once."""
    for server in servers:
        server.reset()
    quiet._warned.clear()


def ask(client: openai.OpenAI, text: str = "hi", **more: Any) -> Any:
    return client.chat.completions.create(model="stub", messages=[{"role": "user", "content": text}], **more)


def ask_async(client: openai.AsyncOpenAI, text: str = "hi", **more: Any) -> Any:
    return client.chat.completions.create(model="stub", messages=[{"role": "user", "content": text}], **more)


def sync_client(server: StubServer, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=CANARY, **{"max_retries": 0, **more})


def async_client(server: StubServer, **more: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url, api_key=CANARY, **{"max_retries": 0, **more})


# -- putting it on and taking it off -----------------------------------------------------------------------------------
def test_install_twice_is_once_and_uninstall_puts_back_exactly_what_was_there() -> None:
    """The SDK's methods are wrapped once, look the same from outside, and come back as the same objects."""
    before = (sdk.SyncAPIClient.request, sdk.AsyncAPIClient.request)
    assert gate.install()
    once = (sdk.SyncAPIClient.request, sdk.AsyncAPIClient.request)
    assert gate.install()
    assert (sdk.SyncAPIClient.request, sdk.AsyncAPIClient.request) == once
    assert once != before
    assert inspect.signature(once[0]) == inspect.signature(before[0])
    gate.uninstall()
    gate.uninstall()
    assert (sdk.SyncAPIClient.request, sdk.AsyncAPIClient.request) == before


def test_a_changed_sdk_is_left_alone_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the method is not what it was, nothing is installed and one line says so."""

    def request(self: Any, kind: Any, *, body: Any) -> None: ...

    monkeypatch.setattr(sdk.SyncAPIClient, "request", request)
    assert not gate.install()
    assert sdk.SyncAPIClient.request is request
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "not supported" in caplog.text


def test_a_wrapper_put_over_ours_survives_uninstall(servers: list[StubServer], tmp_path: Path) -> None:
    """What another library wrapped after us stays, ours beneath it lets everything through, and comes back to life."""
    with managed(tmp_path, {"a": servers[1].url}):
        gate.install()
        ours = sdk.SyncAPIClient.request

        def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
            return ours(self, *args, **kwargs)

        sdk.SyncAPIClient.request = theirs  # type: ignore[method-assign]
        try:
            gate.uninstall()
            assert sdk.SyncAPIClient.request is theirs
            ask(sync_client(servers[0]))
            assert len(servers[0].requests) == 1
            gate.install()
            ask(sync_client(servers[0]))
            assert len(servers[1].requests) == 1
        finally:
            sdk.SyncAPIClient.request = ours  # type: ignore[method-assign]
            gate.uninstall()


@pytest.mark.parametrize(
    ("method", "url", "body", "expected"),
    [
        ("post", "/chat/completions", {}, "/chat/completions"),
        ("POST", "/completions", {}, "/completions"),
        ("post", "/responses", {}, "/responses"),
        ("post", "/deployments/gpt/chat/completions?api-version=1", {}, "/chat/completions"),
        ("post", "https://x.example/openai/deployments/gpt/chat/completions", {}, "/chat/completions"),
        ("get", "/chat/completions", {}, None),
        ("post", "/embeddings", {}, None),
        ("post", "/my_completions", {}, None),
        ("post", "/chat/completions", None, None),
    ],
)
def test_only_model_calls_are_ours(method: str, url: str, body: Any, expected: str | None) -> None:
    """POST to one of three paths with a JSON body, whatever stands before the path."""
    assert gate.suffix_of(FinalRequestOptions.construct(method=method, url=url, json_data=body)) == expected


def test_other_models_and_other_calls_pass_untouched(servers: list[StubServer], tmp_path: Path) -> None:
    """A model outside the fleet, and a call that is no model call, go where they would have gone."""
    with managed(tmp_path, {"a": servers[1].url}):
        maestro.install()
        client = sync_client(servers[0])
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
        assert client.models.list().data
        assert len(servers[0].requests) == 1
        assert "priority" not in servers[0].requests[0].body
        assert not servers[1].requests


# -- what an engine gets -----------------------------------------------------------------------------------------------
@on_module_loop
async def test_nothing_of_the_callers_client_reaches_an_engine(
    servers: list[StubServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key, organisation, project, default or per-call header, query, cookie, auth hook or environment of the caller."""
    monkeypatch.setenv("OPENAI_ORG_ID", CANARY)
    monkeypatch.setenv("OPENAI_PROJECT_ID", CANARY)
    monkeypatch.setenv("OPENAI_ADMIN_KEY", CANARY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Custom: {CANARY}")
    monkeypatch.setenv("ENGINE_KEY", "engine-secret")
    theirs: dict[str, Any] = {
        "organization": CANARY,
        "project": CANARY,
        "default_headers": {"X-Default": CANARY},
        "default_query": {"q": CANARY},
    }
    given: dict[str, Any] = {
        "extra_headers": {"X-Call": CANARY, "Authorization": CANARY, "api-key": CANARY, "Cookie": CANARY},
        "extra_query": {"call": CANARY},
        "extra_body": {"priority": -999, "chat_template_kwargs": {"enable_thinking": False}},
    }

    jar = {"session": CANARY}
    with managed(tmp_path, {"a": servers[1].url}, more='api_key_env = "ENGINE_KEY"\nserved_model = "served"'):
        maestro.install()
        engines._clear()
        httpx = httpx_of(sync_client(servers[0]))
        http = httpx.Client(cookies=jar, auth=httpx.BasicAuth(CANARY, CANARY), headers={"X-Http": CANARY})
        ask(sync_client(servers[0], http_client=http, **theirs), **given)
        ahttp = httpx.AsyncClient(cookies=jar, auth=httpx.BasicAuth(CANARY, CANARY), headers={"X-Http": CANARY})
        client = async_client(servers[0], http_client=ahttp, **theirs)
        await ask_async(client, **given)
        async for _ in await ask_async(client, stream=True, **given):
            pass
    assert not servers[0].requests
    assert len(servers[1].requests) == 3
    for seen in servers[1].requests:
        assert CANARY not in f"{seen.headers} {seen.query} {seen.body}"
        assert seen.headers["authorization"] == "Bearer engine-secret"
        assert seen.body["model"] == "served"
        assert seen.body["priority"] != -999
        assert seen.body["chat_template_kwargs"] == {"enable_thinking": False}


def test_the_callers_timeout_holds_at_the_engine(servers: list[StubServer], tmp_path: Path) -> None:
    """The caller's own timeout ends a call at an engine too, as the SDK's own error."""
    with managed(tmp_path, {"a": servers[1].url}):
        maestro.install()
        with pytest.raises(openai.APITimeoutError) as e:
            ask(sync_client(servers[0], timeout=0.2), "[[hold]]")
        assert not isinstance(e.value, MaestroError)
        servers[1].wait(lambda s: s.requests[0].gone)


def test_waiting_does_not_count_against_the_callers_timeout(servers: list[StubServer], tmp_path: Path) -> None:
    """A call that waits at the gate longer than its own timeout is answered all the same."""
    with managed(tmp_path, {"a": servers[1].url}, slots=1):
        maestro.install()

        async def main() -> Any:
            first = asyncio.create_task(asyncio.to_thread(ask, sync_client(servers[0]), "[[hold]]"))
            await servers[1].wait_async(lambda s: len(s.requests) == 1)
            second = asyncio.create_task(asyncio.to_thread(ask, sync_client(servers[0], timeout=0.3), "quick"))
            await until(lambda: waiting() == 1)
            await asyncio.sleep(0.5)  # longer than the second caller's patience with a server
            servers[1].release()
            return (await first, await second)[1].choices[0].message.content

        assert asyncio.run(main()) == "echo 1 of quick"


# -- streams -----------------------------------------------------------------------------------------------------------
@on_module_loop
@pytest.mark.parametrize("asked", [True, False])
async def test_the_usage_chunk_that_only_we_asked_for_is_hidden(
    servers: list[StubServer], tmp_path: Path, asked: bool
) -> None:
    """Maestro reads the usage of every stream; the caller sees the chunk only where it asked for it."""
    more: dict[str, Any] = {"stream": True, **({"stream_options": {"include_usage": True}} if asked else {})}
    with managed(tmp_path, {"a": servers[1].url}):
        maestro.install()
        with watched_observations() as observed:
            chunks = list(ask(sync_client(servers[0]), **more))
            achunks = [c async for c in await ask_async(async_client(servers[0]), **more)]
            await until(lambda: len(observed) == 2)
    assert all(seen.body["stream_options"] == {"include_usage": True} for seen in servers[1].requests)
    for got in (chunks, achunks):
        assert [c.usage.prompt_tokens for c in got if not c.choices and c.usage] == ([7] if asked else [])
        assert "".join(c.choices[0].delta.content or "" for c in got if c.choices) == "echo 1 of hi"
    for o in observed:
        assert (o.status, o.prompt_tokens, o.output_tokens, o.cached_tokens) == (Status.DONE, 7, 4, 3)
        assert o.granted_at_s <= o.first_byte_at_s <= o.finished_at_s


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
def test_a_stream_is_the_same_however_its_bytes_are_cut(size: int, end: str) -> None:
    """Every byte passes in order, but for the usage chunk; half an event at the end passes too."""

    class Nobody:
        def first_byte(self) -> None: ...
        def grew(self, output_tokens: int) -> None: ...
        def finish(self, usage: Usage, *, ok: bool) -> None: ...
        def cancel(self) -> None: ...

    words = [f'data: {{"choices": [{{"delta": {{"content": "w{n} é"}}}}]}}{end}' for n in range(5)]
    usage = f'data: {{"choices": [], "usage": {{"prompt_tokens": 3, "completion_tokens": 5}}}}{end}'
    rest = [f"data: [DONE]{end}", ": half"]
    sent = "".join([*words, usage, *rest]).encode()
    watcher = Watcher(Nobody(), events=True, hide_usage=True, legible=True)
    got = b"".join(watcher.feed(sent[n : n + size]) for n in range(0, len(sent), size)) + watcher.rest()
    assert got == "".join([*words, *rest]).encode()
    assert (watcher.usage.prompt_tokens, watcher.usage.output_tokens) == (3, 5)


def test_usage_of_the_responses_api_is_read_from_its_events() -> None:
    """The last event carries the whole answer: tokens, calls, the id to go on from, and whether it failed."""
    done: dict[str, Any] = {
        "object": "response",
        "id": "resp-1",
        "output": [{"type": "function_call"}, {"type": "message"}],
        "usage": {"input_tokens": 4, "output_tokens": 6, "input_tokens_details": {"cached_tokens": 2}},
    }
    usage = Usage()
    usage.absorb({"type": "response.completed", "response": done})
    assert usage == Usage(prompt_tokens=4, output_tokens=6, cached_tokens=2, tool_calls=1, response_id="resp-1")
    usage.absorb({"type": "response.failed", "response": done})
    assert usage.failed


@on_module_loop
async def test_usage_and_metrics_of_whole_answers_are_reported(servers: list[StubServer], tmp_path: Path) -> None:
    """Parsed, raw and unread responses report their tokens, tool calls and the engine's own times."""
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body: dict[str, Any] = {
        "model": "stub",
        "messages": [{"role": "user", "content": "[[tool:f {}]]"}],
        "tools": [tool],
    }
    with managed(tmp_path, {"a": servers[1].url}):
        maestro.install()
        client, aclient = sync_client(servers[0]), async_client(servers[0])
        with watched_observations() as observed:
            assert client.chat.completions.create(**body).choices[0].message.tool_calls
            assert client.chat.completions.with_raw_response.create(**body).parse().choices
            with client.chat.completions.with_streaming_response.create(**body) as response:
                assert json.loads(response.read())["choices"]
            assert (await aclient.chat.completions.create(**body)).choices
            assert (await aclient.chat.completions.with_raw_response.create(**body)).parse().choices
            async with aclient.chat.completions.with_streaming_response.create(**body) as aresponse:
                assert json.loads(await aresponse.read())["choices"]
            async for _ in await aclient.chat.completions.create(**body, stream=True):
                pass
            await until(lambda: len(observed) == 7)
    for o in observed:
        assert (o.status, o.prompt_tokens, o.output_tokens, o.tool_calls) == (Status.DONE, 7, 1, 1)
    assert all((o.engine_queue_s, o.engine_ttft_s) == (0.011, 0.022) for o in observed[:6])


@on_module_loop
async def test_a_stream_that_breaks_midway_is_not_replayed(servers: list[StubServer], tmp_path: Path) -> None:
    """After the first byte the caller gets what came and then the SDK's own error; no engine sees the call again."""
    httpx = httpx_of(sync_client(servers[0]))
    errors = (openai.APIConnectionError, httpx.RemoteProtocolError)  # the latter before openai 3
    with managed(tmp_path, {"a": servers[1].url, "b": servers[2].url}):
        maestro.install()
        with watched_observations() as observed:
            got: list[str] = []
            with pytest.raises(errors):
                stream = ask(sync_client(servers[0], max_retries=5), "[[die=4]]", stream=True)
                got.extend(chunk.choices[0].delta.content or "" for chunk in stream)
            with pytest.raises(errors):
                async for _ in await ask_async(async_client(servers[0], max_retries=5), "[[die=4]]", stream=True):
                    pass
            await until(lambda: len(observed) == 2)
        assert "".join(got).startswith("echo 1")
        assert len(servers[1].requests) + len(servers[2].requests) == 2
        assert [o.status for o in observed] == [Status.FAILED, Status.FAILED]


@on_module_loop
async def test_a_stream_that_breaks_before_its_first_byte_moves_on(servers: list[StubServer], tmp_path: Path) -> None:
    """An engine that dies after its headers and before its first token costs the caller nothing."""
    with managed(tmp_path, {"a": servers[1].url, "b": servers[2].url}, max_attempts=3):
        maestro.install()
        with watched_observations() as observed:
            for server in servers[1:]:
                server.deaths = 1
            sync = list(ask(sync_client(servers[0]), stream=True))
            for server in servers[1:]:
                server.deaths = 1
            gc.collect()  # what was dropped of the first try must not touch the second
            chunks = [c async for c in await ask_async(async_client(servers[0]), stream=True)]
            await until(lambda: len(observed) == 2)
        for got in (sync, chunks):
            assert "".join(c.choices[0].delta.content or "" for c in got) == "echo 1 of hi"
        assert [(o.status, o.attempt) for o in observed] == [(Status.DONE, 3)] * 2  # each engine broke once
        with pytest.raises(openai.APIConnectionError):
            async for _ in await ask_async(async_client(servers[0]), "[[die=0]]", stream=True):
                pass
        await until(lambda: held() == 0)


@on_module_loop
async def test_a_stream_left_early_frees_its_engine(servers: list[StubServer], tmp_path: Path) -> None:
    """Closed, or just forgotten: the grant comes back and the engine sees the caller leave."""
    with managed(tmp_path, {"a": servers[1].url}):
        maestro.install()
        stream = ask(sync_client(servers[0]), "[[hold]]", stream=True)
        next(stream)
        stream.close()
        await servers[1].wait_async(lambda s: s.requests[0].gone)
        await until(lambda: held() == 0)

        forgotten = await ask_async(async_client(servers[0]), "[[hold]]", stream=True)
        assert held() == 1
        del forgotten
        gc.collect()
        await until(lambda: held() == 0)
        assert (await ask_async(async_client(servers[0]), "after")).choices[0].message.content == "echo 1 of after"


# -- errors ------------------------------------------------------------------------------------------------------------
@on_module_loop
async def test_a_dead_engine_costs_a_retry_elsewhere(servers: list[StubServer], tmp_path: Path) -> None:
    """A call granted an engine that nobody answers at is served by another, even for a caller without retries."""
    with managed(tmp_path, {"dead": dead_url(), "live": servers[1].url}):
        maestro.install()
        for n in range(3):
            assert ask(sync_client(servers[0]), f"s{n}").choices
            assert (await ask_async(async_client(servers[0]), f"a{n}")).choices
            assert [c async for c in await ask_async(async_client(servers[0]), f"t{n}", stream=True)]
    assert len(servers[1].requests) == 9
    assert not servers[0].requests


def test_a_fleet_of_dead_engines_raises_the_sdks_own_error(servers: list[StubServer], tmp_path: Path) -> None:
    """When every try failed to connect the caller sees what it would have seen without Maestro."""
    with managed(tmp_path, {"x": dead_url(), "y": dead_url()}):
        maestro.install()
        with pytest.raises(openai.APIConnectionError) as e:
            ask(sync_client(servers[0]))
        assert not isinstance(e.value, MaestroError)


@on_module_loop
@pytest.mark.parametrize("status", [503, 429])
async def test_a_full_engine_is_a_signal_not_a_failure(servers: list[StubServer], tmp_path: Path, status: int) -> None:
    """A refusal by an engine's bounded queue puts the stage back into Maestro's, for callers without retries too."""
    with managed(tmp_path, {"a": servers[1].url}):
        maestro.install()
        servers[1].fail(status, status)
        assert ask(sync_client(servers[0])).choices
        servers[1].fail(status)
        assert (await ask_async(async_client(servers[0]))).choices
    assert len(servers[1].requests) == 5


@pytest.mark.parametrize(("retries", "served"), [(2, True), (1, False), (0, False)])
def test_an_engine_error_is_retried_as_often_as_the_caller_said(
    servers: list[StubServer], tmp_path: Path, retries: int, served: bool
) -> None:
    """500 and its like cost one of the caller's own retries each."""
    with managed(tmp_path, {"a": servers[1].url}):
        maestro.install()
        servers[1].fail(500, 502)
        client = sync_client(servers[0], max_retries=retries)
        if served:
            assert ask(client).choices
        else:
            with pytest.raises(openai.InternalServerError):
                ask(client)
        assert len(servers[1].requests) == min(retries, 2) + 1


def test_the_callers_mistake_is_the_callers(servers: list[StubServer], tmp_path: Path) -> None:
    """A 400 is raised as the SDK raises it, at once, and frees the engine."""
    with managed(tmp_path, {"a": servers[1].url}, slots=1):
        maestro.install()
        servers[1].fail(400)
        with pytest.raises(openai.BadRequestError):
            ask(sync_client(servers[0], max_retries=3))
        assert ask(sync_client(servers[0])).choices
    assert len(servers[1].requests) == 2


def test_refusals_are_maestros_and_the_sdks_in_one() -> None:
    """Handlers written for either know them; a retry-after tells when to come back."""
    client = openai.OpenAI(base_url="http://127.0.0.1:1/v1", api_key="k")
    for ours, theirs in (
        (QueueFull("full.", retry_after_s=3.0), openai.RateLimitError),
        (QuotaExceeded("many.", retry_after_s=3.0), openai.RateLimitError),
        (StageRefused("late.", retry_after_s=3.0), openai.RateLimitError),
        (WaitTooLong("long."), openai.APITimeoutError),
        (QueueUnavailable("gone."), openai.APIConnectionError),
        (NoEngineFits("big."), openai.BadRequestError),
    ):
        error = as_sdk_error(ours, httpx_of(client), "http://127.0.0.1:1/v1")
        assert isinstance(error, type(ours))
        assert isinstance(error, theirs)
        assert str(error) == str(ours)
        if isinstance(error, openai.RateLimitError):
            assert (error.status_code, error.response.headers["retry-after"]) == (429, "3.0")
            assert error.retry_after_s == 3.0


def test_a_full_queue_refuses_once_and_the_sdk_does_not_retry(servers: list[StubServer], tmp_path: Path) -> None:
    """One slot taken and one place in the queue taken: who wants to be told early is, at once, whatever its retries."""

    async def main() -> None:
        client = async_client(servers[0], max_retries=5)
        first = asyncio.create_task(ask_async(client, "[[hold]]"))
        await servers[1].wait_async(lambda s: len(s.requests) == 1)
        second = asyncio.create_task(ask_async(client, "second"))
        await until(lambda: waiting() == 1)
        with pytest.raises(openai.RateLimitError) as e, maestro.options(refuse_late=True):
            await ask_async(client, "third")
        assert isinstance(e.value, QueueFull)
        servers[1].release()
        assert (await first).choices
        assert (await second).choices

    with managed(tmp_path, {"a": servers[1].url}, slots=1, max_queue=1):
        maestro.install()
        asyncio.run(main())


@on_module_loop
async def test_a_wait_that_is_too_long_is_a_timeout(servers: list[StubServer], tmp_path: Path) -> None:
    """The bound on waiting raises the SDK's timeout, and nothing was sent."""
    with managed(tmp_path, {"a": servers[1].url}, slots=1, max_wait_s=0.2):
        maestro.install()
        client = async_client(servers[0])
        first = asyncio.create_task(ask_async(client, "[[hold]]"))
        await servers[1].wait_async(lambda s: len(s.requests) == 1)
        with pytest.raises(openai.APITimeoutError) as e:
            await ask_async(client, "second")
        assert isinstance(e.value, WaitTooLong)
        servers[1].release()
        await first
    assert len(servers[1].requests) == 1


# -- cancellation ------------------------------------------------------------------------------------------------------
@on_module_loop
async def test_a_call_cancelled_while_it_waits_is_never_sent(servers: list[StubServer], tmp_path: Path) -> None:
    """It leaves the queue at once; the one behind it is served."""
    with managed(tmp_path, {"a": servers[1].url}, slots=1):
        maestro.install()
        client = async_client(servers[0])
        first = asyncio.create_task(ask_async(client, "[[hold]]"))
        await servers[1].wait_async(lambda s: len(s.requests) == 1)
        second = asyncio.create_task(ask_async(client, "second"))
        await until(lambda: waiting() == 1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await until(lambda: waiting() == 0)
        third = asyncio.create_task(ask_async(client, "third"))
        servers[1].release()
        assert (await first).choices
        assert (await third).choices
    assert [s.body["messages"][0]["content"] for s in servers[1].requests] == ["[[hold]]", "third"]


@on_module_loop
@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_cancelled_at_the_engine_frees_it(servers: list[StubServer], tmp_path: Path, stream: bool) -> None:
    """The engine sees the caller leave and the grant comes back."""
    with managed(tmp_path, {"a": servers[1].url}, slots=1):
        maestro.install()

        async def read() -> None:
            answer = await ask_async(async_client(servers[0]), "[[hold]]", stream=stream)
            async for _ in answer:
                pass

        task = asyncio.create_task(read())
        await servers[1].wait_async(lambda s: len(s.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await servers[1].wait_async(lambda s: s.requests[0].gone)
        await until(lambda: held() == 0)


@on_module_loop
async def test_a_synchronous_call_on_a_busy_loop_does_not_lock_it(
    servers: list[StubServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the only slot held by a call of the same loop it is served at once, and one line says how to do better."""
    with managed(tmp_path, {"a": servers[1].url}, slots=1, max_wait_s=5):
        maestro.install()
        stream = await ask_async(async_client(servers[0]), "[[hold]]", stream=True)
        await anext(stream)
        for _ in range(2):
            assert ask(sync_client(servers[0]), "blocking").choices[0].message.content == "echo 1 of blocking"
        servers[1].release()
        async for _ in stream:
            pass
    assert caplog.text.count("use ainvoke") == 1


# -- bugs of ours ------------------------------------------------------------------------------------------------------
@on_module_loop
@pytest.mark.parametrize(
    ("target", "name"),
    [
        (call, "stage_numbers"),
        (call, "_runtime"),
        (call, "take_caller"),
        (Client, "open"),
        (Pass, "wait"),
        (Pass, "wait_async"),
        (Pass, "sent"),
        (Pass, "first_byte"),
        (Pass, "grew"),
        (Pass, "finish"),
        (engines, "outgoing"),
        (engines, "sync_client"),
        (engines, "async_client"),
        (Usage, "absorb"),
        (Watcher, "_read"),
        (call, "tap"),
        (call, "_answer"),
    ],
)
async def test_a_bug_of_ours_never_breaks_a_call(
    servers: list[StubServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    target: Any,
    name: str,
) -> None:
    """Whatever fails in Maestro's own steps, every call gets its normal answer."""
    with managed(tmp_path, {"a": servers[1].url}):
        maestro.install()

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError

        monkeypatch.setattr(target, name, broken)
        client, aclient = sync_client(servers[0]), async_client(servers[0])
        assert ask(client).choices[0].message.content == "echo 1 of hi"
        assert (await ask_async(aclient)).choices[0].message.content == "echo 1 of hi"
        text = "".join(c.choices[0].delta.content or "" for c in ask(client, stream=True) if c.choices)
        assert text == "echo 1 of hi"
        atext = [c.choices[0].delta.content or "" async for c in await ask_async(aclient, stream=True) if c.choices]
        assert "".join(atext) == "echo 1 of hi"
    assert sum(len(s.requests) for s in servers) == 4
    assert sum("ZeroDivisionError" in r.getMessage() for r in caplog.records) <= 2


def test_a_setting_that_cannot_be_read_is_told_and_the_call_goes_on(
    servers: list[StubServer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelled environment does not take the program down."""
    Client.reset()
    monkeypatch.setenv("MAESTRO_MODE", "fast")
    maestro.install()
    try:
        assert ask(sync_client(servers[0])).choices
        assert "MAESTRO_MODE" in caplog.text
    finally:
        maestro.uninstall()


# -- the rest ----------------------------------------------------------------------------------------------------------
def test_a_conversation_stays_with_the_engine_that_holds_it(servers: list[StubServer], tmp_path: Path) -> None:
    """``previous_response_id`` sends the next turn to the engine of the one before, every time."""
    with managed(tmp_path, {"a": servers[1].url, "b": servers[2].url}):
        maestro.install()
        client = sync_client(servers[0])
        for _ in range(3):
            first = client.responses.create(model="stub", input="hello")
            place = servers[1] if str(servers[1].port) in first.id else servers[2]
            for _ in range(3):
                first = client.responses.create(model="stub", input="more", previous_response_id=first.id)
                assert str(place.port) in first.id
        other, name = (servers[2], "b") if place is servers[1] else (servers[1], "a")
        call._answered_by[first.id] = name  # as if the engine that is not free-est had answered
        moved = client.responses.create(model="stub", input="more", previous_response_id=first.id)
        assert str(other.port) in moved.id


@on_module_loop
async def test_each_event_loop_has_its_own_clients() -> None:
    """A client is shared on one loop, never between two, and a closed loop's are forgotten."""
    engine = EngineSpec(engine_id="e", url="http://127.0.0.1:1/v1", model="m")

    async def mine() -> openai.AsyncOpenAI:
        assert engines.async_client(engine) is engines.async_client(engine)
        return engines.async_client(engine)

    here = await mine()
    others = [await asyncio.to_thread(lambda: asyncio.run(mine())) for _ in range(3)]
    assert len({id(c) for c in (here, *others)}) == 4
    assert sum(loop.is_closed() for loop in engines._async) <= 1
    assert engines.sync_client(engine) is engines.sync_client(engine)


def test_a_forked_child_starts_anew(servers: list[StubServer], tmp_path: Path) -> None:
    """A child forked from a process in use has no engine clients of its parent and makes its calls on its own."""
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'[[engine]]\nid = "a"\nmodel = "stub"\nurl = "{servers[1].url}"\n')
    program = textwrap.dedent("""
        import os, sys
        import openai
        from maestro_langgraph import maestro, engines
        maestro.install()
        client = openai.OpenAI(base_url=sys.argv[1], api_key="k", max_retries=0)
        say = lambda t: client.chat.completions.create(model="stub", messages=[{"role": "user", "content": t}])
        say("parent")
        assert engines._sync
        child = os.fork()
        if child == 0:
            assert not engines._sync
            say("child")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        say("parent again")
    """)
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(str(p) for p in (root, root / "integrations", root / "serving"))
    subprocess.run(
        [sys.executable, "-c", program, servers[0].url],
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path, "MAESTRO_FLEET": str(fleet)},
    )
    assert [s.body["messages"][0]["content"] for s in servers[1].requests] == ["parent", "child", "parent again"]
