"""A small OpenAI-compatible server for tests: it echoes, streams, calls tools, and fails or waits when it is told to.

The same request gets the same words from every server, so that answers can be compared. Directives in the last user text:

``[[hold]]``        the answer waits until `StubServer.release`
``[[die=N]]``       the connection breaks after N events of a stream (0: before the first)
``[[tool:NAME {..}]]``  a tool call, unless a tool result follows

`StubServer.fail` makes the next requests fail with the given statuses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from maestro_agents import client as client_module
from maestro_agents.client import Client, Pass
from maestro_agents.core import Grant, Observation
from maestro_langgraph import maestro


@dataclass
class Seen:
    """One request as it arrived."""

    path: str
    query: str
    headers: dict[str, str]
    body: dict[str, Any]
    raw: str
    gone: bool = False


@dataclass
class StubServer:
    """One server on a free port of 127.0.0.1, on its own thread and loop."""

    requests: list[Seen] = field(default_factory=list)
    failures: deque[int] = field(default_factory=deque)
    #: Streams that break before their first event.
    deaths: int = 0
    port: int = 0

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", self.port))
        self.port = self._socket.getsockname()[1]
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/responses", self._responses, methods=["POST"]),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            Route("/v1/models", self._models),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off", timeout_keep_alive=60)
        self._server = uvicorn.Server(config)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            self._released = asyncio.Event()
            self._ready.set()
            await self._server.serve(sockets=[self._socket])

        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(main())

    # -- for the test ------------------------------------------------------------------------------------------------
    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def fail(self, *statuses: int) -> None:
        """Answer the next requests with these statuses."""
        self.failures.extend(statuses)

    def release(self) -> None:
        """Let go of what is held, now and later."""
        self._loop.call_soon_threadsafe(self._released.set)

    def hold(self) -> None:
        """Hold again."""
        self._loop.call_soon_threadsafe(self._released.clear)

    def wait(self, what: Callable[[StubServer], bool], timeout_s: float = 10) -> None:
        """Block until a condition on this server holds."""
        with self._changed:
            assert self._changed.wait_for(lambda: what(self), timeout_s), f"it did not happen: {self.requests}"

    async def wait_async(self, what: Callable[[StubServer], bool]) -> None:
        await asyncio.to_thread(self.wait, what)

    def reset(self) -> None:
        self.requests.clear()
        self.failures.clear()
        self.deaths = 0
        self.hold()

    def stop(self) -> None:
        self.release()
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(5)
        self._socket.close()

    # -- the server --------------------------------------------------------------------------------------------------
    def _note(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    async def _arrive(self, request: Request) -> Seen:
        raw = await request.body()
        seen = Seen(
            path=request.url.path,
            query=request.url.query,
            headers=dict(request.headers),
            body=json.loads(raw),
            raw=raw.decode(),
        )
        self._note(lambda: self.requests.append(seen))
        return seen

    async def _hold(self, request: Request, seen: Seen) -> bool:
        """Wait for `release`; False where the caller left meanwhile."""
        if "[[hold]]" not in seen.raw:
            return True
        released = asyncio.ensure_future(self._released.wait())
        while not released.done():
            await asyncio.wait([released], timeout=0.02)
            if await request.is_disconnected():
                released.cancel()
                self._note(lambda: setattr(seen, "gone", True))
                return False
        return True

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "stub", "object": "model"}]})

    async def _chat(self, request: Request) -> Response:
        seen = await self._arrive(request)
        if self.failures and (status := self.failures.popleft()):
            return JSONResponse({"error": {"message": f"stub says {status}"}}, status)
        body = seen.body
        content, calls = _answer(body)
        base = {"id": "chatcmpl-stub", "created": 0, "model": body["model"]}
        usage = {
            "prompt_tokens": 7,
            "completion_tokens": len((content or "x").split()),
            "total_tokens": 7 + len((content or "x").split()),
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        if not body.get("stream"):
            if not await self._hold(request, seen):
                return Response(status_code=499)
            message = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
            choice = {"index": 0, "finish_reason": "tool_calls" if calls else "stop", "message": message}
            metrics = {"queue_time_ms": 11.0, "time_to_first_token_ms": 22.0}
            return JSONResponse(
                {**base, "object": "chat.completion", "choices": [choice], "usage": usage, "metrics": metrics}
            )
        asked = (body.get("stream_options") or {}).get("include_usage")
        events = _chunks(base, content, calls, usage if asked else None)
        return StreamingResponse(self._stream(request, seen, events), media_type="text/event-stream")

    async def _stream(self, request: Request, seen: Seen, events: list[str]) -> AsyncIterator[str]:
        die = re.search(r"\[\[die=(\d+)\]\]", seen.raw)
        try:
            if self.deaths:
                self.deaths -= 1
                raise ConnectionAbortedError
            for n, event in enumerate(events):
                if die and n == int(die.group(1)):
                    raise ConnectionAbortedError
                if n == 2 and not await self._hold(request, seen):
                    return
                yield event
                await asyncio.sleep(0)
        except (asyncio.CancelledError, GeneratorExit):
            self._note(lambda: setattr(seen, "gone", True))
            raise

    async def _completions(self, request: Request) -> Response:
        seen = await self._arrive(request)
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        choice = {"index": 0, "text": f"echo: {seen.body['prompt']}", "finish_reason": "stop", "logprobs": None}
        about = {"id": "cmpl-stub", "object": "text_completion", "created": 0, "model": seen.body["model"]}
        return JSONResponse({**about, "choices": [choice], "usage": usage})

    async def _embeddings(self, request: Request) -> Response:
        seen = await self._arrive(request)
        given = seen.body["input"]
        data = [
            {"object": "embedding", "index": i, "embedding": [0.25, 0.5]}
            for i, _ in enumerate([given] if isinstance(given, str) else given)
        ]
        usage = {"prompt_tokens": 4, "total_tokens": 4}
        return JSONResponse({"object": "list", "model": seen.body["model"], "data": data, "usage": usage})

    async def _responses(self, request: Request) -> Response:
        seen = await self._arrive(request)
        text = f"echo: {seen.body.get('input')}"
        message = {
            "type": "message",
            "id": "msg",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": text, "annotations": []}],
        }
        usage = {
            "input_tokens": 7,
            "output_tokens": 2,
            "total_tokens": 9,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        return JSONResponse(
            {
                "id": f"resp-{self.port}-{len(self.requests)}",
                "object": "response",
                "created_at": 0,
                "model": seen.body["model"],
                "status": "completed",
                "output": [message],
                "parallel_tool_calls": False,
                "tool_choice": "auto",
                "tools": [],
                "usage": usage,
            }
        )


def _answer(body: dict[str, Any]) -> tuple[str | None, list[dict[str, Any]]]:
    messages = body["messages"]
    asked = [n for n, m in enumerate(messages) if m["role"] == "user"]
    text = str(messages[asked[-1]]["content"]) if asked else ""
    answered = any(m["role"] == "tool" for m in messages[asked[-1] if asked else 0 :])
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        return None, [_call(choice["function"]["name"], {"name": "stub", "score": 1})]
    found = re.findall(r"\[\[tool:(\w+) (\{.*?\})\]\]", text)
    if body.get("tools") and found and not answered:
        return None, [_call(name, json.loads(args)) for name, args in found]
    if (body.get("response_format") or {}).get("type") == "json_schema":
        return json.dumps({"name": "stub", "score": 1}), []
    return f"echo {len(messages)} of {text[:60]}", []


def _call(name: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": json.dumps(args)}}


def _chunks(base: dict[str, Any], content: str | None, calls: list[dict[str, Any]], usage: Any) -> list[str]:
    def event(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return f"data: {json.dumps({**base, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

    events = [event({"role": "assistant", "content": ""})]
    events += [event({"tool_calls": [{**call, "index": n}]}) for n, call in enumerate(calls)]
    events += [event({"content": word}) for word in re.findall(r"\S+\s*", content or "")]
    events.append(event({}, "tool_calls" if calls else "stop"))
    if usage:
        last = {**base, "object": "chat.completion.chunk", "choices": [], "usage": usage}
        events.append(f"data: {json.dumps(last)}\n\n")
    return [*events, "data: [DONE]\n\n"]


def dead_url() -> str:
    """An address where nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/v1"


@contextlib.contextmanager
def stub_servers(n: int) -> Iterator[list[StubServer]]:
    """Run several servers."""
    servers = [StubServer() for _ in range(n)]
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


def fleet_toml(urls: dict[str, str], *, slots: int = 4, model: str = "stub", more: str = "") -> str:
    """A fleet file with one engine per id."""
    engines = [
        f'[[engine]]\nid = "{i}"\nmodel = "{model}"\nurl = "{url}"\nslots = {slots}\n{more}' for i, url in urls.items()
    ]
    return "\n".join(engines)


@contextlib.contextmanager
def managed(folder: Path, urls: dict[str, str], *, slots: int = 4, more: str = "", **settings: Any) -> Iterator[None]:
    """This process under Maestro with a fleet of its own (or, without engines, none); everything is put back after."""
    if urls:
        path = folder / "fleet.toml"
        path.write_text(fleet_toml(urls, slots=slots, more=more))
        settings["fleet"] = path
    maestro.configure(**settings)
    try:
        yield
    finally:
        maestro.uninstall()
        client_module._overrides.clear()
        Client.reset()


async def until(condition: Callable[[], object]) -> None:
    """Wait for something of another thread that gives no event."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def waiting() -> int:
    """Count the stages of this process that wait for a grant."""
    return len(Client.current()._room.waiting)


def held() -> int:
    """Count the grants that this process holds."""
    return len(Client.current()._room.held)


@contextlib.contextmanager
def watched_observations() -> Iterator[list[Observation]]:
    """What the client reports of each stage, as it reports it."""
    seen: list[Observation] = []
    room = Client.current()._room
    finish = room.finish

    async def spy(p: Pass, grant: Grant, observation: Observation) -> None:
        seen.append(observation)
        await finish(p, grant, observation)

    at_once = room.finish_at_once

    def spy_at_once(p: Pass, grant: Grant, observation: Observation) -> bool:
        told = at_once(p, grant, observation)
        if told:
            seen.append(observation)
        return told

    room.finish = spy  # type: ignore[method-assign]
    room.finish_at_once = spy_at_once  # type: ignore[method-assign]
    yield seen
