"""A server that speaks vLLM's protocol and computes nothing: its timing is `maestro_agents.simulator.engine`'s.

What it answers is decided by the request alone (`maestro_serving.answers`), when it answers by the model. Prompts and
answers are neither logged nor kept. ``tests/test_vllm_contract.py`` holds it to a real vLLM.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import socket
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from maestro_agents.simulator.engine import CPU_TINY, EngineProfile, RequestRecord
from maestro_serving.admin import Admin, Memory
from maestro_serving.answers import Answer, Question, answer
from maestro_serving.live import EngineBusyError, LiveEngine, Metrics
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
from maestro_serving.shapes import (
    FINGERPRINT,
    Deltas,
    Job,
    blank,
    chat_choice,
    chat_reason,
    event,
    response_item,
    signature,
    tool_id,
)
from maestro_serving.streams import EventStream, finished, told, unless_gone

VERSION: Final = "0.32.0+maestro.emulator"
"""The vLLM whose protocol this is."""

_BUSY: Final = "The engine is busy: its queue is full. Try again later, or elsewhere."


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
    #: The administrator's endpoints are there (vLLM ``VLLM_SERVER_DEV_MODE=1``), and open to everybody.
    dev_mode: bool = False

    def __post_init__(self) -> None:
        names = [m.name for m in self.models]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"an emulator needs at least one model, each with a name of its own; got {names}")


OnRequest = Callable[[bytes], None]
"""Told the body of each request to the model as it arrives. For tests and benches; the emulator itself keeps nothing."""


class EmulatedServer:
    """One server: its engines, the state between asleep and awake, and the ASGI app.

    ``build``: makes the engine of a model (with its number) where that is not alone on its GPU; ``memory``: that GPU's.
    """

    def __init__(
        self,
        config: EmulatorConfig,
        *,
        on_request: OnRequest | None = None,
        build: Callable[[EmulatedModel, int, Metrics], LiveEngine] | None = None,
        memory: Memory | None = None,
    ) -> None:
        metrics = Metrics()
        made = [
            build(m, i, metrics)
            if build
            else LiveEngine(m.name, m.profile.faster(config.speed), index=i, metrics=metrics)
            for i, m in enumerate(config.models)
        ]
        self.engines = {engine.name: engine for engine in made}
        self.admin = Admin(made, metrics, memory)
        self.app = _app(_Server(config, self.engines, metrics, on_request), self.admin)


def _app(server: _Server, admin: Admin) -> Starlette:
    routes = [
        Route("/health", server.health),
        Route("/version", server.version),
        Route("/metrics", server.metrics_page),
        Route("/v1/models", server.list_models),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/responses", server.responses, methods=["POST"]),
    ]
    return Starlette(routes=routes + admin.routes() if server.config.dev_mode else routes)


class _Server:
    def __init__(
        self,
        config: EmulatorConfig,
        engines: Mapping[str, LiveEngine],
        metrics: Metrics,
        on_request: OnRequest | None,
    ) -> None:
        self.config = config
        self.on_request = on_request
        self.metrics = metrics
        self.started_at_s = int(time.time())
        self.engines = engines

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
                return await EventStream.open(self.chat_chunks(job, body))
            records = await finished(job)
            named = body.tool_choice is not None and not isinstance(body.tool_choice, str)
            choices = [chat_choice(i, a, named=named) for i, a in enumerate(job.answers)]
            return JSONResponse(
                {
                    "id": job.request_id,
                    "object": "chat.completion",
                    "created": job.created,
                    "model": job.engine.name,
                    "choices": choices,
                    "service_tier": None,
                    "system_fingerprint": FINGERPRINT,
                    "usage": job.used(records),
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
                return await EventStream.open(self.completion_chunks(job, body))
            records = await finished(job)
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
                    "system_fingerprint": FINGERPRINT,
                    "usage": job.used(records),
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
                return await EventStream.open(self.response_events(job, body))
            records = await finished(job)
            item = response_item(job.answers[0], status="completed") if records[0].output_tokens else None
            return JSONResponse(self.response_body(job, body, item=item, record=records[0]))

        return await self.answered(request, reply())

    async def answered(self, request: Request, reply: Coroutine[Any, Any, Response]) -> Response:
        """The reply, or vLLM's error; nothing, and the work aborted, where the client is gone."""
        if refusal := self.unauthorized(request):
            reply.close()
            return refusal
        body = await request.body()  # from now on `receive` tells of nothing but the client's leaving
        if self.on_request is not None:
            self.on_request(body)
        try:
            return await unless_gone(request.receive, reply) or Response(status_code=499)
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
    ) -> Job:
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
        unique = uuid.uuid4().hex[:16]
        if prefix == "resp":  # there the caller's id is taken as it is
            request_id = body.request_id or f"resp_{unique}"
        else:
            request_id = f"{prefix}-{request.headers.get('x-request-id') or body.request_id or unique}"
        return Job(
            request_id=request_id,
            numbered={"cmpl": "-", "resp": "_"}.get(prefix, ""),
            created=int(time.time()),
            engine=engine,
            questions=questions,
            answers=answers,
            priority=body.priority,
        )

    def request_metrics(self, records: list[RequestRecord]) -> dict[str, Any] | None:
        """As vLLM's ``--enable-per-request-metrics``: of a single answer only. Time in the queue counts in nothing else."""
        if not self.config.per_request_metrics or len(records) != 1:
            return None
        r = records[0]
        return {
            "time_to_first_token_ms": 1000 * (r.ttft_s - r.queue_s) if r.output_tokens else None,
            "generation_time_ms": 1000 * r.generation_s if r.output_tokens else 0.0,
            "queue_time_ms": 1000 * r.queue_s if r.started_at_s < math.inf else None,
            "mean_itl_ms": 1000 * r.generation_s / (r.output_tokens - 1) if r.output_tokens > 1 else None,
            "tokens_per_second": r.output_tokens / (r.ended_at_s - r.started_at_s) if r.output_tokens else None,
        }

    # -- streams ------------------------------------------------------------------------------------------------------
    async def chat_chunks(self, job: Job, body: ChatBody) -> AsyncGenerator[str | None]:
        named = body.tool_choice is not None and not isinstance(body.tool_choice, str)
        continuous = bool(body.stream_options and body.stream_options.continuous_usage_stats)

        def chunk(index: int, delta: Mapping[str, Any], done: Answer | None, tokens: int, **more: Any) -> str:
            choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            if done:
                choice |= {"finish_reason": chat_reason(done, named=named), "stop_reason": done.stop_reason}
                more |= signature(body)
            if continuous:
                more["usage"] = job.usage(tokens)
            return event(job, "chat.completion.chunk", [choice], **more)

        def deltas(index: int, before: int, after: int, *, last: bool) -> list[str]:
            a = job.answers[index]
            done = a if last else None
            out: list[str] = []
            if before == 0:
                out.append(chunk(index, {"role": "assistant", "content": ""}, None, 0))
            text = "".join(a.pieces[before:after])
            if a.tool:
                if before == 0:
                    call = {"id": tool_id(), "type": "function", "index": 0, "function": {"name": a.tool}}
                    out.append(chunk(index, {"content": None, "tool_calls": [call]}, None, after))
                if text:
                    part = {"index": 0, "function": {"arguments": text}}
                    out.append(chunk(index, {"content": None, "tool_calls": [part]}, None, after))
                if last:
                    out.append(chunk(index, {}, done, after))
            elif last and a.finish_reason == "abort":
                # Who was aborted before it had a token gets no end but that of the stream.
                out += [chunk(index, {"content": text}, None, after)] if text else []
                out += [chunk(index, {"content": ""}, done, after)] if after else []
            elif last or text:
                # What ends by itself ends with an empty chunk (the end-of-text token), a cut answer with its last text.
                cut = a.finish_reason == "length" or not text
                out += [chunk(index, {"content": text}, None, after)] if not cut or not last else []
                out += [chunk(index, {"content": text} if cut and text else {}, done, after)] if last else []
            return out

        async for line in self.chunks(job, body, "chat.completion.chunk", deltas):
            yield line

    async def completion_chunks(self, job: Job, body: CompletionBody) -> AsyncGenerator[str | None]:
        continuous = bool(body.stream_options and body.stream_options.continuous_usage_stats)

        def deltas(index: int, before: int, after: int, *, last: bool) -> list[str]:
            a = job.answers[index]
            text = "".join(a.pieces[before:after])
            more = {"usage": job.usage(after)} if continuous else {}

            def chunk(text: str, done: Answer | None) -> str:
                choice: dict[str, Any] = {
                    "index": index,
                    "text": text,
                    "logprobs": None,
                    "finish_reason": done and done.finish_reason,
                    "stop_reason": done and done.stop_reason,
                }
                return event(job, "text_completion", [choice], **more, **(signature(body) if done else {}))

            if last and a.finish_reason == "abort":
                return [*([chunk(text, None)] if text else []), *([chunk("", a)] if after else [])]
            return [chunk(text, a if last else None)]

        async for line in self.chunks(job, body, "text_completion", deltas):
            yield line

    async def chunks(self, job: Job, body: Sampled, kind: str, deltas: Deltas) -> AsyncGenerator[str | None]:
        """All answers' chunks as their tokens come, then usage, then the end. None first: admitted."""
        with job.engine.run(job.requests(), job.reasons) as flows:
            yield None
            async for index, before, after, last in told(job, flows):
                for line in deltas(index, before, after, last=last):
                    yield line
            records = [await flow.end() for flow in flows]
        if body.stream_options and body.stream_options.include_usage:
            metrics = self.request_metrics(records)
            more = {"metrics": {k: v for k, v in metrics.items() if v is not None}} if metrics else {}
            yield event(job, kind, [], usage=job.used(records), system_fingerprint=FINGERPRINT, **more)
        yield "data: [DONE]\n\n"

    async def response_events(self, job: Job, body: ResponsesBody) -> AsyncGenerator[str | None]:
        a = job.answers[0]
        item = response_item(a, status="in_progress")
        where = {"item_id": item["id"], "output_index": 0}
        number = 0

        def say(kind: str, **content: Any) -> str:
            nonlocal number
            data = json.dumps({**content, "sequence_number": number, "type": kind})
            number += 1
            return f"event: {kind}\ndata: {data}\n\n"

        with job.engine.run(job.requests(), job.reasons) as flows:
            yield None
            for kind in ("response.created", "response.in_progress"):
                begun = self.response_body(job, body, item=None, record=None)
                yield say(kind, response={k: v for k, v in begun.items() if k != "metrics"})
            async for _, before, after, _ in told(job, flows):
                if before == 0 < after:
                    yield say("response.output_item.added", item=blank(item), output_index=0)
                    if not a.tool:
                        part: dict[str, Any] = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
                        yield say("response.content_part.added", content_index=0, part=part, **where)
                if not (text := "".join(a.pieces[before:after])):
                    continue
                if a.tool:
                    yield say("response.function_call_arguments.delta", delta=text, **where)
                else:
                    yield say("response.output_text.delta", content_index=0, delta=text, logprobs=[], **where)
            record = await flows[0].end()
        if not record.output_tokens:
            yield say("response.completed", response=self.response_body(job, body, item=None, record=record))
            return
        if job.answers[0] is not a:  # it was aborted meanwhile
            a = job.answers[0]
            item = {**response_item(a, status="in_progress"), "id": item["id"]}
        done = {**item, "status": "completed"}
        if a.tool:
            yield say("response.function_call_arguments.done", arguments=a.text, name=a.tool, **where)
        else:
            yield say("response.output_text.done", content_index=0, text=a.text, logprobs=[], **where)
            yield say("response.content_part.done", content_index=0, part=item["content"][0], **where)
        yield say("response.output_item.done", item=done, output_index=0)
        yield say("response.completed", response=self.response_body(job, body, item=done, record=record))

    def response_body(
        self, job: Job, body: ResponsesBody, *, item: dict[str, Any] | None, record: RequestRecord | None
    ) -> dict[str, Any]:
        """A response object; in progress where it has no record yet."""
        cut = record is not None and job.answers[0].finish_reason == "length"
        usage = record and {
            "input_tokens": job.prompt_tokens,
            "input_tokens_details": {"cached_tokens": record.cached_tokens},
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


# -- running it --------------------------------------------------------------------------------------------------------
class _Uvicorn(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], *, signals: bool) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._signals = signals

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        with super().capture_signals() if self._signals else contextlib.nullcontext():
            yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()


def server_of(app: Starlette, on_ready: Callable[[], None], *, signals: bool = True) -> uvicorn.Server:
    """What serves an app, and says when it listens. ``signals``: it ends at SIGINT and SIGTERM."""
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    return _Uvicorn(settings, on_ready, signals=signals)


def listen(host: str, port: int) -> socket.socket:
    """A TCP socket bound to an address; port 0: a free one. Raises OSError."""
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
    with listen(host, port) as listener:
        url = url_of(listener)
        await server_of(EmulatedServer(config).app, lambda: on_ready(url)).serve(sockets=[listener])


def url_of(listener: socket.socket) -> str:
    """The URL of a server at a socket, ending in ``/v1``."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class Emulator:
    """An emulator in a thread of this process, for tests: ``with Emulator() as engine: ... engine.url``."""

    def __init__(
        self, config: EmulatorConfig | None = None, *, port: int = 0, on_request: OnRequest | None = None
    ) -> None:
        self._ready = threading.Event()
        self._listener = listen("127.0.0.1", port)
        served = EmulatedServer(config or EmulatorConfig(), on_request=on_request)
        self._server = server_of(served.app, self._ready.set)
        self._thread = threading.Thread(
            target=lambda: self._server.run(sockets=[self._listener]), name="emulator", daemon=True
        )
        #: Ends in ``/v1``.
        self.url = url_of(self._listener)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(20):
            raise TimeoutError("the emulator did not start within 20 s")
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()
