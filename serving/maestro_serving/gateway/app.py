"""The gateway's paths: who may call, what is wrong with a request, errors in OpenAI's shape, metrics.

No prompt and no answer is logged, kept, or put into an error of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, cast

import httpx
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from maestro_agents.client import Client
from maestro_agents.errors import QueueUnavailable
from maestro_agents.queue.redis import RedisQueue
from maestro_agents.settings import Settings
from maestro_serving.gateway.keys import KeyRing
from maestro_serving.gateway.relay import Answer, Call, RefusedCall, Relay, Request, no_such_model
from maestro_serving.streams import unless_gone

log = logging.getLogger("maestro")

CALLS: Final = ("/chat/completions", "/completions", "/responses", "/embeddings")
"""What callers ask of models, below ``/v1``."""

MAX_BODY_BYTES: Final = 20 << 20
BODY_S: Final = 60.0
"""A request must have come in whole within so many seconds."""

STALL_S: Final = 60.0
"""A caller who takes nothing of its answer for so long is cut off."""

SWEEP_S: Final = 10.0
LONGEST_MODEL: Final = 256

ABORT: Final = "maestro.abort"
"""Key of an ASGI scope's ``state``: what cuts its connection at once (`server.Connection`)."""


class Gateway:
    """One gateway process: ``app`` is its ASGI application, whose lifespan starts and ends everything.

    ``tenant``: whose every call is, without keys; None: that of its key, which Redis knows.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        tenant: str | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        cors: Sequence[str] = (),
        stall_s: float = STALL_S,
    ) -> None:
        self._settings = settings
        self._tenant = tenant
        self._max_body_bytes = max_body_bytes
        self.stall_s = stall_s
        self.metrics = Metrics()
        self._started_at_s = int(time.time())
        middleware = Middleware(
            CORSMiddleware,
            allow_origins=cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["retry-after", "x-request-id", "x-maestro-run"],
        )
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics_page),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._model),
                *(Route(f"/v1{path}", self._calling(path), methods=["POST"]) for path in CALLS),
            ],
            middleware=[middleware] if cors else [],
            exception_handlers={RefusedCall: _refused, HTTPException: _no_such_path},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncGenerator[None]:
        self.client = Client(self._settings)
        self.relay = Relay(self.client)
        self.keys: KeyRing | None = None
        tasks = [asyncio.create_task(self._sweep())]
        if self._tenant is None:
            url = cast("str", self._settings.redis_url)  # `maestro gateway` made sure
            self.keys = KeyRing(RedisQueue(url, pool=self._settings.pool))
            tasks.append(asyncio.create_task(self.keys.keep()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.outage_after_s):
                while not self.client.ready or (self.keys is not None and not self.keys.known):
                    await asyncio.sleep(0.01)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.relay.close()
            await asyncio.to_thread(self.client.close)
            if self.keys is not None:
                await self.keys.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.relay.runs.end_idle()

    # -- what is asked about the gateway -------------------------------------------------------------------------------
    async def _health(self, request: HttpRequest) -> Response:
        """200 where calls can be served, by the last known engines at least."""
        fleet = bool(self.client.models)
        body = {"status": "ok" if fleet else "no fleet", "queue": "out" if self.client.out else "ok"}
        return JSONResponse(body, status_code=200 if fleet else 503)

    async def _metrics_page(self, request: HttpRequest) -> Response:
        return Response(generate_latest(self.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _models(self, request: HttpRequest) -> Response:
        listed = self.relay.models_of(self._caller(request))
        return JSONResponse({"object": "list", "data": [self._described(m, n) for m, n in listed.items()]})

    async def _model(self, request: HttpRequest) -> Response:
        listed = self.relay.models_of(self._caller(request))
        model = str(request.path_params["model"])
        if model not in listed:
            raise no_such_model(model)
        return JSONResponse(self._described(model, listed[model]))

    def _described(self, model: str, longest: int) -> dict[str, Any]:
        described = {"id": model, "object": "model", "created": self._started_at_s, "owned_by": "maestro"}
        return {**described, "max_model_len": longest} if longest else described

    # -- calls ---------------------------------------------------------------------------------------------------------
    def _calling(self, path: str) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def called(request: HttpRequest) -> Response:
            self.metrics.open.inc()
            call: Call | None = None
            try:
                tenant = self._caller(request)
                body = self._checked(tenant, await self._read(request))
                asked = Request(path=path, tenant=tenant, body=body, headers=dict(request.headers))
                call = Call(self.relay, asked)
                answer = await unless_gone(request.receive, call.answer())
                if answer is None:
                    raise ClientDisconnect
                return _Through(answer, self.stall_s, lambda status: self._count(path, status, call))
            except RefusedCall as e:
                self._count(path, e.status, call)
                return _error(e)
            except ClientDisconnect:
                self._count(path, 499, call)
                return Response(status_code=499)
            except Exception as e:  # a bug of ours: where, and never what was asked
                trace, where = e.__traceback__, ""
                while trace is not None:
                    where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
                    trace = trace.tb_next
                log.error("a bug in Maestro (gateway): %s at %s", type(e).__name__, where)
                if call is not None:
                    call.cancel()
                self._count(path, 500, call)
                return _error(RefusedCall(500, "The gateway failed.", kind="server_error", code="internal_error"))
            except BaseException:
                self._count(path, 499, call)
                raise

        return called

    def _count(self, path: str, status: int, call: Call | None) -> None:
        self.metrics.open.dec()
        self.metrics.calls.labels(path, status).inc()
        if call is None:
            return
        if call.granted_monotonic_s:
            self.metrics.wait_s.observe(call.granted_monotonic_s - call.began_monotonic_s)
        if call.first_byte_monotonic_s:
            self.metrics.first_byte_s.observe(call.first_byte_monotonic_s - call.began_monotonic_s)
        self.metrics.tokens.labels("prompt").inc(call.usage.prompt_tokens)
        self.metrics.tokens.labels("output").inc(call.usage.output_tokens or call.usage.content_events)

    def _caller(self, request: HttpRequest) -> str:
        """The tenant that calls. Raises `RefusedCall`."""
        if self._tenant is not None:
            return self._tenant
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise RefusedCall(
                401, "No API key was given. Send it as `Authorization: Bearer mk-...`.", code="invalid_api_key"
            )
        ring = cast("KeyRing", self.keys)
        tenant = ring.tenant_of(key.strip())
        if tenant is None and not ring.known:
            raise RefusedCall.of(QueueUnavailable())
        if tenant is None:
            raise RefusedCall(401, "This API key is not known, or was removed.", code="invalid_api_key")
        return tenant

    async def _read(self, request: HttpRequest) -> bytes:
        """The body, never more of it than is allowed. Raises `RefusedCall`."""
        if request.headers.get("content-encoding", "identity") != "identity":
            raise RefusedCall(415, "Send the body uncompressed.", code="unsupported_encoding")
        body = bytearray()
        seen_bytes = 0
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in request.stream():
                    seen_bytes += len(chunk)
                    if seen_bytes <= self._max_body_bytes:
                        body += chunk
                    elif seen_bytes > 2 * self._max_body_bytes:  # that far an answer can reach who still sends
                        break
        except TimeoutError:
            raise RefusedCall(408, f"The body did not come within {BODY_S:g} s.", code="request_timeout") from None
        if seen_bytes > self._max_body_bytes:
            message = f"The body is larger than {self._max_body_bytes:,} bytes."
            raise RefusedCall(413, message, code="request_too_large")
        return bytes(body)

    def _checked(self, tenant: str, raw: bytes) -> Mapping[str, Any]:
        """The body of a call for a model that its tenant may use. Raises `RefusedCall`."""
        try:
            body: object = json.loads(raw, parse_constant=_no_number)
        except (ValueError, RecursionError):  # its message would quote the body
            raise RefusedCall(400, "The body is not JSON.", code="invalid_json") from None
        if not isinstance(body, dict):
            raise RefusedCall(400, "The body is not a JSON object.", code="invalid_json")
        found = cast("dict[str, Any]", body)
        model = found.get("model")
        if not isinstance(model, str) or not model:
            raise RefusedCall(400, "You must provide a model parameter.", code="missing_model", param="model")
        if found.get("background"):
            message = "An answer in the background cannot be fetched here: leave `background` out, or stream."
            raise RefusedCall(400, message, code="unsupported_parameter", param="background")
        if not self.client.models:
            raise RefusedCall.of(QueueUnavailable())
        if len(model) > LONGEST_MODEL or model not in self.relay.models_of(tenant):
            raise no_such_model(model)
        return found


class Metrics:
    """What a gateway counts, for Prometheus. Nothing of it names a tenant: ``/metrics`` asks for no key."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
        self.calls = Counter(
            "maestro_gateway_calls", "Calls that ended, by path and status (499: left)", ("path", "status"), registry=r
        )
        self.open = Gauge("maestro_gateway_open_calls", "Calls that wait or are answered now", registry=r)
        self.wait_s = Histogram(
            "maestro_gateway_wait_seconds", "From a call's coming to its grant", buckets=seconds, registry=r
        )
        self.first_byte_s = Histogram(
            "maestro_gateway_first_byte_seconds", "From a call's coming to its first byte", buckets=seconds, registry=r
        )
        self.tokens = Counter("maestro_gateway_tokens", "As engines counted them", ("kind",), registry=r)


class _Through(Response):
    """An engine's answer on its way to the caller; it ends, with all behind it, when the caller leaves."""

    def __init__(self, answer: Answer, stall_s: float, ended: Callable[[int], None]) -> None:
        super().__init__(headers=answer.headers)
        if "content-length" not in answer.headers:
            del self.headers["content-length"]
        self._answer = answer
        self._stall_s = stall_s
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 499
        try:
            if await unless_gone(receive, self._pump(send)):
                status = 200
            elif abort := scope.get("state", {}).get(ABORT):
                abort()
                await asyncio.sleep(0)  # its end is heard before ours
        finally:
            await cast("Any", self._answer.tap).aclose()
            self._ended(status)

    async def _pump(self, send: Send) -> bool:
        """Pass all of it on. False: the answer broke off, or its reader takes nothing, and the connection must go."""
        whole = True  # the caller has whole events so far
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._answer.tap:
                whole = chunk.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))
                async with asyncio.timeout(self._stall_s):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TimeoutError:
            return False
        except (httpx.HTTPError, httpx.StreamError):
            if not (self._answer.events and whole):
                return False
            lost = RefusedCall(502, "The engine failed in the middle of its answer.", kind="server_error")
            event = f"data: {json.dumps(lost.body)}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True


def _no_number(constant: str) -> float:
    """NaN and infinities are no JSON."""
    raise ValueError(constant)


def _error(error: RefusedCall) -> Response:
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers = {
            "retry-after": f"{max(1, math.ceil(error.retry_after_s))}",
            "retry-after-ms": f"{1000 * error.retry_after_s:.0f}",
        }
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _refused(_request: HttpRequest, error: Exception) -> Response:
    return _error(cast("RefusedCall", error))


async def _no_such_path(request: HttpRequest, error: Exception) -> Response:
    """Wrong path or method, also where ``/v1`` was left out of a client's base URL."""
    status = cast("HTTPException", error).status_code
    known = [f"/v1{path}" for path in (*CALLS, "/models")]
    hint = (
        f" Is the client's base URL this gateway's, with /v1? Try /v1{request.url.path}."
        if (f"/v1{request.url.path}" in known)
        else f" There are {', '.join(known)}."
    )
    message = f"{request.method} {request.url.path[:200]} is not served here.{hint}"
    return _error(RefusedCall(status, message, code="not_found" if status == 404 else "method_not_allowed"))
