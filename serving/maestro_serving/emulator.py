"""A server that speaks vLLM's protocol and computes nothing: its timing is `maestro_agents.simulator.engine`'s.

What it answers is decided by the request alone (`maestro_serving.answers`), when it answers by the model. Prompts and
answers are neither logged nor kept. ``tests/test_vllm_contract.py`` holds it to a real vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self, TypeVar

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from maestro_agents.simulator.engine import CPU_TINY, EngineProfile, EngineRequest, RequestRecord
from maestro_serving.answers import Answer, Question, answer
from maestro_serving.live import EngineBusyError, Flow, LiveEngine, Metrics
from maestro_serving.protocol import (
    ChatBody,
    CompletionBody,
    Limits,
    RefusedError,
    ResponsesBody,
    Sampled,
    chat_questions,
    completion_questions,
    parse,
    response_question,
)

VERSION: Final = "0.32.0+maestro.emulator"
"""The vLLM whose protocol this is."""

_FINGERPRINT: Final = "maestro-emulator"
_BUSY: Final = "The engine is busy: its queue is full. Try again later, or elsewhere."
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmulatedModel:
    """One model, with an engine of its own."""

    name: str
    profile: EngineProfile = CPU_TINY


@dataclass(frozen=True, kw_only=True, slots=True)
class EmulatorConfig:
    """What one emulator process serves."""

    models: tuple[EmulatedModel, ...] = (EmulatedModel(name="tiny"),)
    #: How many times faster than its profile every engine runs.
    speed: float = 1.0
    api_key: str | None = None
    #: ``metrics`` in every answer (vLLM ``--enable-per-request-metrics``).
    per_request_metrics: bool = True

    def __post_init__(self) -> None:
        names = [m.name for m in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"an emulator needs at least one model, each with a name of its own; got {names}")


def create_app(config: EmulatorConfig) -> Starlette:
    """The ASGI app."""
    server = _Server(config)
    routes = [
        Route("/health", server.health),
        Route("/version", server.version),
        Route("/metrics", server.metrics_page),
        Route("/v1/models", server.list_models),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/responses", server.responses, methods=["POST"]),
    ]
    return Starlette(routes=routes)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """Answers that are known and wait for their tokens' time."""

    request_id: str
    created: int
    engine: LiveEngine
    questions: list[Question]
    answers: list[Answer]
    priority: int

    @property
    def requests(self) -> list[EngineRequest]:
        return [
            EngineRequest(
                request_id=f"{self.request_id}-{i}-{uuid.uuid4().hex}",  # a caller's id may come twice
                prompt_tokens=q.prompt_tokens,
                output_tokens=len(a.pieces),
                priority=self.priority,
            )
            for i, (q, a) in enumerate(zip(self.questions, self.answers, strict=True))
        ]

    @property
    def prompt_tokens(self) -> int:
        """Each prompt once, however many answers it has."""
        return sum(q.prompt_tokens for q in self.questions if q.index == 0)

    @property
    def reasons(self) -> list[str]:
        return [a.finish_reason for a in self.answers]

    def usage(self, output_tokens: int, *, details: bool = True) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + output_tokens,
            "completion_tokens": output_tokens,
        }
        return usage | {"prompt_tokens_details": {"cached_tokens": 0}} if details else usage


class _Deltas(Protocol):
    """The chunks that tell an answer's tokens from ``before`` up to ``after``; ``last``: there are no more."""

    def __call__(self, index: int, before: int, after: int, *, last: bool) -> list[str]: ...


class _Server:
    def __init__(self, config: EmulatorConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.started_at_s = int(time.time())
        self.engines = {
            m.name: LiveEngine(m.name, m.profile.faster(config.speed), index=i, metrics=self.metrics)
            for i, m in enumerate(config.models)
        }

    # -- what is asked about the server -------------------------------------------------------------------------------
    async def health(self, request: Request) -> Response:
        return Response()

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": VERSION})

    async def metrics_page(self, request: Request) -> Response:
        return Response(generate_latest(self.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def list_models(self, request: Request) -> Response:
        if refusal := self.unauthorized(request):
            return refusal
        models: list[dict[str, Any]] = [
            {
                "id": name,
                "object": "model",
                "created": self.started_at_s,
                "owned_by": "vllm",
                "root": name,
                "parent": None,
                "max_model_len": engine.profile.max_model_len,
                "permission": [],
            }
            for name, engine in self.engines.items()
        ]
        return JSONResponse({"object": "list", "data": models})

    # -- the three ways to ask the model ------------------------------------------------------------------------------
    async def chat(self, request: Request) -> Response:
        async def reply() -> Response:
            body = parse(ChatBody, await request.body(), request.headers)
            job = self.job(request, body, "chatcmpl", lambda limits: chat_questions(body, limits))
            if body.stream:
                return await _EventStream.open(self.chat_chunks(job, body))
            records = await _finished(job)
            named = body.tool_choice is not None and not isinstance(body.tool_choice, str)
            choices = [_chat_choice(i, a, named=named) for i, a in enumerate(job.answers)]
            return JSONResponse(
                {
                    "id": job.request_id,
                    "object": "chat.completion",
                    "created": job.created,
                    "model": job.engine.name,
                    "choices": choices,
                    "service_tier": None,
                    "system_fingerprint": _FINGERPRINT,
                    "usage": job.usage(sum(r.output_tokens for r in records)),
                    "prompt_logprobs": None,
                    "kv_transfer_params": None,
                    "metrics": self.request_metrics(records),
                }
            )

        return await self.answered(request, reply())

    async def completions(self, request: Request) -> Response:
        async def reply() -> Response:
            body = parse(CompletionBody, await request.body(), request.headers)
            job = self.job(request, body, "cmpl", lambda limits: completion_questions(body, limits))
            if body.stream:
                return await _EventStream.open(self.completion_chunks(job, body))
            records = await _finished(job)
            choices = [
                {
                    "index": i,
                    "text": a.text,
                    "logprobs": None,
                    "finish_reason": a.finish_reason,
                    "stop_reason": a.stop_reason,
                }
                for i, a in enumerate(job.answers)
            ]
            return JSONResponse(
                {
                    "id": job.request_id,
                    "object": "text_completion",
                    "created": job.created,
                    "model": job.engine.name,
                    "choices": choices,
                    "service_tier": None,
                    "system_fingerprint": _FINGERPRINT,
                    "usage": job.usage(sum(r.output_tokens for r in records)),
                    "kv_transfer_params": None,
                    "metrics": self.request_metrics(records),
                }
            )

        return await self.answered(request, reply())

    async def responses(self, request: Request) -> Response:
        async def reply() -> Response:
            body = parse(ResponsesBody, await request.body(), request.headers)
            job = self.job(request, body, "resp", lambda limits: [response_question(body, limits)])
            if body.stream:
                return await _EventStream.open(self.response_events(job, body))
            records = await _finished(job)
            item = _response_item(job.answers[0], status="completed")
            return JSONResponse(self.response_body(job, body, item=item, record=records[0]))

        return await self.answered(request, reply())

    async def answered(self, request: Request, reply: Coroutine[Any, Any, Response]) -> Response:
        """The reply, or vLLM's error; nothing, and the work aborted, where the client is gone."""
        if refusal := self.unauthorized(request):
            reply.close()
            return refusal
        await request.body()  # from now on `receive` tells of nothing but the client's leaving
        try:
            return await _unless_gone(request.receive, reply) or Response(status_code=499)
        except RefusedError as e:
            return JSONResponse(e.body, status_code=e.status)
        except EngineBusyError:
            refused = RefusedError(503, _BUSY, kind="Service Unavailable")
            return JSONResponse(refused.body, status_code=503)

    def unauthorized(self, request: Request) -> Response | None:
        key = self.config.api_key
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is None or hmac.compare_digest(given.encode(), key.encode()):
            return None
        return JSONResponse({"error": "Unauthorized"}, status_code=401)

    def job(
        self,
        request: Request,
        body: ChatBody | CompletionBody | ResponsesBody,
        prefix: str,
        ask: Callable[[Limits], list[Question]],
    ) -> _Job:
        name = body.model or next(iter(self.engines))
        engine = self.engines.get(name)
        if engine is None:
            known = ", ".join(self.engines)
            raise RefusedError(
                404, f"The model `{name}` does not exist. Known: {known}.", kind="NotFoundError", param="model"
            )
        questions = ask(Limits(model=name, max_model_len=engine.profile.max_model_len))
        try:
            answers = [answer(q) for q in questions]
        except ValueError as e:
            raise RefusedError(400, f"The schema cannot be satisfied: {e}") from None
        request_id = request.headers.get("x-request-id") or body.request_id or uuid.uuid4().hex[:16]
        separator = "_" if prefix == "resp" else "-"
        return _Job(
            request_id=f"{prefix}{separator}{request_id}",
            created=int(time.time()),
            engine=engine,
            questions=questions,
            answers=answers,
            priority=body.priority,
        )

    def request_metrics(self, records: list[RequestRecord]) -> dict[str, Any] | None:
        """As vLLM's ``--enable-per-request-metrics``: of a single answer only."""
        if not self.config.per_request_metrics or len(records) != 1:
            return None
        r = records[0]
        return {
            "time_to_first_token_ms": 1000 * r.ttft_s,
            "generation_time_ms": 1000 * r.generation_s,
            "queue_time_ms": 1000 * r.queue_s,
            "mean_itl_ms": 1000 * r.generation_s / (r.output_tokens - 1) if r.output_tokens > 1 else None,
            "tokens_per_second": r.output_tokens / (r.ended_at_s - r.arrived_at_s),
        }

    # -- streams ------------------------------------------------------------------------------------------------------
    async def chat_chunks(self, job: _Job, body: ChatBody) -> AsyncGenerator[str | None]:
        named = body.tool_choice is not None and not isinstance(body.tool_choice, str)
        continuous = bool(body.stream_options and body.stream_options.continuous_usage_stats)

        def chunk(index: int, delta: Mapping[str, Any], done: Answer | None, tokens: int, **more: Any) -> str:
            choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            if done:
                choice |= {"finish_reason": _chat_reason(done, named=named), "stop_reason": done.stop_reason}
                more |= _signature(body)
            if continuous:
                more["usage"] = job.usage(tokens, details=False)
            return _event(job, "chat.completion.chunk", [choice], **more)

        def deltas(index: int, before: int, after: int, *, last: bool) -> list[str]:
            a = job.answers[index]
            done = a if last else None
            out: list[str] = []
            if before == 0:
                out.append(chunk(index, {"role": "assistant", "content": ""}, None, 0))
            text = "".join(a.pieces[before:after])
            if a.tool:
                if before == 0:
                    call = {"id": _tool_id(), "type": "function", "index": 0, "function": {"name": a.tool}}
                    out.append(chunk(index, {"content": None, "tool_calls": [call]}, None, after))
                if text:
                    part = {"index": 0, "function": {"arguments": text}}
                    out.append(chunk(index, {"content": None, "tool_calls": [part]}, None, after))
                if last:
                    out.append(chunk(index, {}, done, after))
            elif last or text:
                # What ends by itself ends with an empty chunk (the end-of-text token), a cut answer with its last text.
                cut = a.finish_reason == "length" or not text
                out += [chunk(index, {"content": text}, None, after)] if not cut or not last else []
                out += [chunk(index, {"content": text} if cut and text else {}, done, after)] if last else []
            return out

        async for event in self.chunks(job, body, "chat.completion.chunk", deltas):
            yield event

    async def completion_chunks(self, job: _Job, body: CompletionBody) -> AsyncGenerator[str | None]:
        continuous = bool(body.stream_options and body.stream_options.continuous_usage_stats)

        def deltas(index: int, before: int, after: int, *, last: bool) -> list[str]:
            a = job.answers[index]
            choice: dict[str, Any] = {
                "index": index,
                "text": "".join(a.pieces[before:after]),
                "logprobs": None,
                "finish_reason": a.finish_reason if last else None,
                "stop_reason": a.stop_reason if last else None,
            }
            more = {"usage": job.usage(after, details=False)} if continuous else {}
            return [_event(job, "text_completion", [choice], **more, **(_signature(body) if last else {}))]

        async for event in self.chunks(job, body, "text_completion", deltas):
            yield event

    async def chunks(self, job: _Job, body: Sampled, kind: str, deltas: _Deltas) -> AsyncGenerator[str | None]:
        """All answers' chunks as their tokens come, then usage, then the end. None first: admitted."""
        with job.engine.run(job.requests, job.reasons) as flows:
            yield None
            async for index, before, after, last in _told(flows):
                for event in deltas(index, before, after, last=last):
                    yield event
            records = [await flow.end() for flow in flows]
        if body.stream_options and body.stream_options.include_usage:
            metrics = self.request_metrics(records)
            more = {"metrics": {k: v for k, v in metrics.items() if v is not None}} if metrics else {}
            usage = job.usage(sum(r.output_tokens for r in records))
            yield _event(job, kind, [], usage=usage, system_fingerprint=_FINGERPRINT, **more)
        yield "data: [DONE]\n\n"

    async def response_events(self, job: _Job, body: ResponsesBody) -> AsyncGenerator[str | None]:
        a = job.answers[0]
        item = _response_item(a, status="in_progress")
        where = {"item_id": item["id"], "output_index": 0}
        number = 0

        def event(kind: str, **content: Any) -> str:
            nonlocal number
            data = json.dumps({**content, "sequence_number": number, "type": kind})
            number += 1
            return f"event: {kind}\ndata: {data}\n\n"

        with job.engine.run(job.requests, job.reasons) as flows:
            yield None
            for kind in ("response.created", "response.in_progress"):
                begun = self.response_body(job, body, item=None, record=None)
                yield event(kind, response={k: v for k, v in begun.items() if k != "metrics"})
            async for _, before, after, _ in _told(flows):
                if before == 0:
                    yield event("response.output_item.added", item=_blank(item), output_index=0)
                    if not a.tool:
                        part: dict[str, Any] = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
                        yield event("response.content_part.added", content_index=0, part=part, **where)
                if not (text := "".join(a.pieces[before:after])):
                    continue
                if a.tool:
                    yield event("response.function_call_arguments.delta", delta=text, **where)
                else:
                    yield event("response.output_text.delta", content_index=0, delta=text, logprobs=[], **where)
            record = await flows[0].end()
        done = {**item, "status": "completed"}
        if a.tool:
            yield event("response.function_call_arguments.done", arguments=a.text, name=a.tool, **where)
        else:
            yield event("response.output_text.done", content_index=0, text=a.text, logprobs=[], **where)
            yield event("response.content_part.done", content_index=0, part=item["content"][0], **where)
        yield event("response.output_item.done", item=done, output_index=0)
        yield event("response.completed", response=self.response_body(job, body, item=done, record=record))

    def response_body(
        self, job: _Job, body: ResponsesBody, *, item: dict[str, Any] | None, record: RequestRecord | None
    ) -> dict[str, Any]:
        """A response object; in progress where it has no record yet."""
        cut = record is not None and job.answers[0].finish_reason == "length"
        usage = record and {
            "input_tokens": job.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": record.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": job.prompt_tokens + record.output_tokens,
        }
        tools = [t.model_dump(exclude_none=True) for t in body.tools]
        return {
            "id": job.request_id,
            "created_at": job.created,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "metadata": body.metadata,
            "model": job.engine.name,
            "object": "response",
            "output": [item] if item else [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else job.questions[0].tool_choice,
            "tools": tools,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "background": False,
            "max_output_tokens": job.questions[0].max_tokens,
            "previous_response_id": None,
            "reasoning": None,
            "service_tier": "auto",
            "status": "in_progress" if record is None else "incomplete" if cut else "completed",
            "text": None,
            "truncation": "disabled",
            "usage": usage,
            "user": None,
            "metrics": self.request_metrics([record]) if record else None,
        }


# -- shapes ------------------------------------------------------------------------------------------------------------
def _chat_reason(a: Answer, *, named: bool) -> str:
    """A call that the caller named ends as ``stop``, one that the model chose as ``tool_calls`` (OpenAI's habit)."""
    return "tool_calls" if a.tool and a.finish_reason == "stop" and not named else a.finish_reason


def _chat_choice(index: int, a: Answer, *, named: bool) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": a.text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    if a.tool and a.finish_reason == "stop":  # a call that was cut stays text
        call = {
            "id": _tool_id(),
            "type": "function",
            "function": {"name": a.tool, "arguments": a.text},
        }
        message |= {"content": "", "tool_calls": [call]}
    return {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": _chat_reason(a, named=named),
        "stop_reason": a.stop_reason,
    }


def _response_item(a: Answer, *, status: str) -> dict[str, Any]:
    unique = uuid.uuid4().hex[:16]
    if a.tool:
        return {
            "arguments": a.text,
            "call_id": f"chatcmpl-tool-{unique}",
            "name": a.tool,
            "type": "function_call",
            "id": f"fc_{unique}",
            "status": status,
        }
    part: dict[str, Any] = {"annotations": [], "text": a.text, "type": "output_text", "logprobs": None}
    return {"id": f"msg_{unique}", "content": [part], "role": "assistant", "status": status, "type": "message"}


def _blank(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item of the Responses API before anything was said."""
    return {**item, "arguments": ""} if item["type"] == "function_call" else {**item, "content": []}


def _tool_id() -> str:
    return f"chatcmpl-tool-{uuid.uuid4().hex[:16]}"


def _signature(body: Sampled) -> dict[str, Any]:
    """The last chunk of an answer is signed, unless a usage chunk follows, which is signed then."""
    follows = body.stream_options and body.stream_options.include_usage
    return {} if follows else {"system_fingerprint": _FINGERPRINT}


def _event(job: _Job, kind: str, choices: list[dict[str, Any]], **more: Any) -> str:
    body = {"id": job.request_id, "object": kind, "created": job.created, "model": job.engine.name, "choices": choices}
    return f"data: {json.dumps({**body, **more}, ensure_ascii=False, separators=(',', ':'))}\n\n"


# -- waiting -----------------------------------------------------------------------------------------------------------
async def _finished(job: _Job) -> list[RequestRecord]:
    with job.engine.run(job.requests, job.reasons) as flows:
        return [await flow.end() for flow in flows]


async def _told(flows: list[Flow]) -> AsyncGenerator[tuple[int, int, int, bool]]:
    """(index, tokens before, tokens now, last) of each flow, whenever it has more."""
    told = [0] * len(flows)
    news = {asyncio.ensure_future(flow.more()): i for i, flow in enumerate(flows)}
    try:
        while news:
            done, _ = await asyncio.wait(news, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda t: news[t]):
                i = news.pop(task)
                before, told[i] = told[i], task.result()
                last = flows[i].record is not None and told[i] == flows[i].request.output_tokens
                if told[i] > before:
                    yield i, before, told[i], last
                if not last:
                    news[asyncio.ensure_future(flows[i].more())] = i
    finally:
        for task in news:
            task.cancel()


async def _unless_gone(receive: Receive, work: Awaitable[_T]) -> _T | None:
    """The result of ``work``; None, with the work cancelled, where the client left first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _EventStream(Response):
    """Server-sent events that end, with the work behind them, when the client leaves, also while nothing is sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str | None]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._events = events

    @classmethod
    async def open(cls, events: AsyncGenerator[str | None]) -> _EventStream:
        """Start the generator up to its first item, so that a refusal is still an ordinary answer."""
        await anext(events)
        return cls(events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def pump() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": (event or "").encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _unless_gone(receive, pump())
        finally:
            await self._events.aclose()


# -- running it --------------------------------------------------------------------------------------------------------
class _Uvicorn(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()


def _uvicorn(config: EmulatorConfig, on_ready: Callable[[], None]) -> _Uvicorn:
    settings = uvicorn.Config(
        create_app(config), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=1
    )
    return _Uvicorn(settings, on_ready)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, or asyncio does not switch Nagle's algorithm off, and every answer comes 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


async def serve(
    config: EmulatorConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    on_ready: Callable[[str], None] = lambda _url: None,
) -> None:
    """Serve until SIGINT or SIGTERM (or until cancelled). ``on_ready`` gets the URL, ending in ``/v1``.

    Raises OSError where the port is taken. Port 0 chooses a free one.
    """
    with _listen(host, port) as listener:
        url = _url(listener)
        await _uvicorn(config, lambda: on_ready(url)).serve(sockets=[listener])


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class Emulator:
    """An emulator in a thread of this process, for tests: ``with Emulator() as engine: ... engine.url``."""

    def __init__(self, config: EmulatorConfig | None = None, *, port: int = 0) -> None:
        self._ready = threading.Event()
        self._listener = _listen("127.0.0.1", port)
        self._server = _uvicorn(config or EmulatorConfig(), self._ready.set)
        self._thread = threading.Thread(
            target=lambda: self._server.run(sockets=[self._listener]), name="emulator", daemon=True
        )
        #: Ends in ``/v1``.
        self.url = _url(self._listener)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(20):
            raise TimeoutError("the emulator did not start within 20 s")
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()
