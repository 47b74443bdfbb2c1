"""One call's way through the gateway: ticket, grant, engine, and the bytes of its answer through to the caller.

A call moves to another engine only before the first byte of its answer. Whoever leaves takes the call along: the connection
to its engine is closed, which is how vLLM is told to stop, and its stage is withdrawn. Nothing is read ahead of a slow reader
beyond a few socket buffers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import httpx

from maestro_agents.client import Client, Pass
from maestro_agents.core import EngineSpec, Mode, Ticket
from maestro_agents.errors import (
    MaestroError,
    NoEngineFits,
    QueueFull,
    QueueUnavailable,
    QuotaExceeded,
    RunGone,
    StageRefused,
    WaitTooLong,
)
from maestro_agents.hints import Said, merged, outward, said
from maestro_agents.predict.features import RunFacts, stage_numbers
from maestro_agents.predict.prefix import prompt_blocks
from maestro_agents.predict.prompt import choices_asked, mapping, max_output_tokens
from maestro_agents.usage import AsyncTap, Usage, Watcher
from maestro_serving.gateway.identity import OUTCOMES, Run, Runs
from maestro_serving.proxy import DOWN_HEADER

log = logging.getLogger("maestro")

SCHEDULERS_ONLY: Final = (
    "priority",
    "cache_salt",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "nvext",
    "agent_hint",
    "request_id",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "data_parallel_rank",
    "chat_template",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "prompt_embeds",
)
"""What a caller may not say to an engine: orders to its scheduler or to other servers, keys of its caches, templates and raw
tensors that it would run or load. They are left out of what is sent; hints among them are read first."""

RETRIES: Final = 2
"""Further engines after an error of one that was no sign of a full queue, as the OpenAI SDK would try."""

CONNECT_S: Final = 5.0
SILENT_S: Final = 600.0
"""An engine that says nothing for so long has failed. The OpenAI SDK gives up then too."""

BUSY_RETRY_S: Final = 1.0
MOST_TOKENS: Final = 2**24
MOST_CHOICES: Final = 2**12
"""Bounds of what a ticket says; what lies beyond, the engine refuses itself."""

MAX_ERROR_BYTES: Final = 64 << 10
MAX_RESPONSES: Final = 10_000

_BUSY: Final = frozenset({429, 503})
_RETRYABLE: Final = frozenset({408, 409, 500, 502, 504})
_CALLERS_FAULT: Final = frozenset({400, 413, 422})
_NOWHERE: Final = "gateway:"
"""Stands for the caller's own URL, which a gateway's callers do not have."""


_LATER: Final[Mapping[type[QueueFull | QuotaExceeded | StageRefused], str]] = {
    QueueFull: "queue_full",
    QuotaExceeded: "quota_exceeded",
    StageRefused: "stage_refused",
}
"""What to try again later, and its code."""


class RefusedCall(Exception):
    """A call that gets an error for an answer, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def of(cls, error: MaestroError) -> RefusedCall:
        """One of ours, as a caller's handlers know it."""
        text = str(error)
        for refused, code in _LATER.items():
            if isinstance(error, refused):
                return cls(429, text, kind="rate_limit_error", code=code, retry_after_s=error.retry_after_s)
        if isinstance(error, WaitTooLong):
            return cls(504, text, kind="server_error", code="wait_too_long")
        if isinstance(error, NoEngineFits):
            return cls(400, text, code="context_length_exceeded")
        if isinstance(error, RunGone):
            return cls(400, text, code="run_ended")
        return cls(
            503,
            "The service is not available now. Try again later.",
            kind="server_error",
            code="unavailable",
            retry_after_s=BUSY_RETRY_S,
        )


def no_such_model(model: str) -> RefusedCall:
    """As OpenAI says it."""
    message = f"The model {model[:200]!r} does not exist or you do not have access to it."
    return RefusedCall(404, message, code="model_not_found", param="model")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller asks, as far as it was read and found to be a request."""

    #: Below ``/v1``.
    path: str
    tenant: str
    body: Mapping[str, Any]
    headers: Mapping[str, str]

    @property
    def model(self) -> str:
        return cast("str", self.body["model"])


@dataclass(kw_only=True)
class Answer:
    """An engine's answer whose first bytes are here: ``tap`` has them and all that follow."""

    headers: dict[str, str]
    events: bool
    tap: AsyncIterator[bytes]
    call: Call


class Relay:
    """What calls share: the queue's client, connections to engines, runs, and who answered what."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.runs = Runs(client)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
        self.http = httpx.AsyncClient(
            timeout=httpx.Timeout(SILENT_S, connect=CONNECT_S), trust_env=False, limits=limits, follow_redirects=False
        )
        #: Engine -> calls of ours there that no scheduler placed.
        self.unplaced: Counter[str] = Counter()
        #: (tenant, id of a response) -> who has its conversation, and the run that it belongs to.
        self.responses: OrderedDict[tuple[str, str], tuple[str, Run | None]] = OrderedDict()
        self._own_salt = secrets.token_bytes(16)
        self._pool_salt = b""

    async def close(self) -> None:
        self.runs.end_all()
        await self.http.aclose()

    def models_of(self, tenant: str) -> dict[str, int]:
        """The models that a tenant may use, and the longest prompt + output of each (0: not known)."""
        engines = self.client.engines
        closed = {e.model for e in engines} - {e.model for e in engines if tenant not in e.closed_to}
        longest = dict.fromkeys(sorted(self.client.models - closed), 0)
        for e in engines:
            if e.model in longest and tenant not in e.closed_to:
                longest[e.model] = max(longest[e.model], e.max_model_len)
        return longest

    def salt_of(self, tenant: str) -> str:
        """What keeps a tenant's prompts apart from those of others in the prefix caches of engines."""
        self._pool_salt = self.client.salt or self._pool_salt
        return hashlib.blake2b(tenant.encode(), key=self._pool_salt or self._own_salt, digest_size=32).hexdigest()

    def remember(self, tenant: str, response_id: str, engine_id: str, run: Run | None) -> None:
        self.responses[tenant, response_id] = (engine_id, run)
        while len(self.responses) > MAX_RESPONSES:
            self.responses.popitem(last=False)


class Call:
    """One call. Its answer is watched (`maestro_agents.usage.Watched`); the first end counts."""

    def __init__(self, relay: Relay, request: Request) -> None:
        self.relay = relay
        self.request = request
        self.began_monotonic_s = time.monotonic()
        self.granted_monotonic_s = 0.0
        self.first_byte_monotonic_s = 0.0
        self.usage = Usage()
        self.engine: EngineSpec | None = None
        self.ended = False
        self.retries_left = RETRIES
        self.last_error: RefusedCall | None = None
        #: Engines that failed this call where no queue keeps account of them.
        self._tried: set[str] = set()
        self._unplaced: str = ""
        now_s = relay.client.now_s()
        self.said = said(request.body, request.headers, now_s=now_s)
        #: What the engines get, but for what depends on which of them.
        self.body: dict[str, Any] = {k: v for k, v in request.body.items() if k not in SCHEDULERS_ONLY}
        if request.path != "/embeddings":
            self.body["cache_salt"] = relay.salt_of(request.tenant)
        options = request.body.get("stream_options")
        self.hides_usage = (
            bool(request.body.get("stream"))
            and request.path in {"/chat/completions", "/completions"}
            and (options is None or (isinstance(options, Mapping) and not cast("Any", options).get("include_usage")))
        )
        if self.hides_usage:
            self.body["stream_options"] = {**(options or {}), "include_usage": True}
        pinned, after = self._previous()
        self.run = relay.runs.of(request.tenant, self.said, request.body, after=after)
        self.node = self.said.role or request.path.strip("/")
        visit = self.run.visit(self.node) if self.run is not None else 0
        try:
            self.ticket = self._ticket(visit, pinned, now_s)
            self.pass_: Pass | None = relay.client.open(self.ticket, original_url=_NOWHERE)
        except BaseException:
            if self.run is not None:
                self.run.open_calls -= 1
            raise
        if self.pass_ is not None:
            self.pass_.patient = False  # its caller's client waits and tries again by itself
        if self.run is not None and (self.pass_ is None or self.pass_.mode is not Mode.ON):
            self.run.observed = True

    def _previous(self) -> tuple[str, Run | None]:
        previous = self.request.body.get("previous_response_id")
        if not isinstance(previous, str) or self.request.path != "/responses":
            return "", None
        known = self.relay.responses.get((self.request.tenant, previous))
        if known is None:
            message = f"Previous response with id {previous[:100]!r} not found. Send the conversation as `input`."
            raise RefusedCall(404, message, code="previous_response_not_found", param="previous_response_id")
        return known

    def _ticket(self, visit: int, pinned: str, now_s: float) -> Ticket:
        request, run, client = self.request, self.run, self.relay.client
        role = f"{request.tenant}/{self.said.role}" if self.said.role else ""
        facts = RunFacts(model=request.model, role=role)
        if run is not None:
            facts = run.history.facts(
                model=request.model, role=role, node=self.node, visit=visit, calls_before=run.calls - 1
            )
        numbers = stage_numbers(self.body, facts, text=client.settings.text_features)
        service_class, deadline_s = self.relay.runs.terms(self.said)
        if run is not None and self.request.headers.get("x-maestro-run-end") in OUTCOMES:
            run.outcome = self.request.headers["x-maestro-run-end"]
        embeds, bound = request.path == "/embeddings", max_output_tokens(self.body)
        return Ticket(
            stage_id=uuid.uuid4().hex,
            client_id=client.client_id,
            model=request.model,
            run_id=run.run_id if run is not None else "",
            workflow=run.workflow if run is not None else "",
            node=self.node,
            role=role,
            service_class=run.service_class if run is not None else service_class,
            tenant=request.tenant,
            site=client.settings.site,
            deadline_at_s=run.deadline_at_s if run is not None else now_s + deadline_s,
            run_started_at_s=run.started_at_s if run is not None else now_s,
            pushed_at_s=now_s,
            due_at_s=now_s,
            prompt_tokens=numbers.prompt_tokens,
            max_tokens=0 if embeds else None if bound is None else min(bound, MOST_TOKENS),
            choices=1 if embeds else min(choices_asked(self.body), MOST_CHOICES),
            prefix="" if embeds else prompt_blocks(self.body, client.salt),
            visit=visit,
            step=self.said.step if self.said.step is not None else (run.calls - 1 if run is not None else 0),
            pinned_engine=pinned,
            streams=bool(request.body.get("stream")),
            features=numbers.features,
            sketch=numbers.sketch,
        )

    # -- where to ------------------------------------------------------------------------------------------------------
    async def _place(self) -> EngineSpec:
        """Wait for an engine. Raises `MaestroError`."""
        self._free_unplaced()
        if self.pass_ is None:
            return self._place_ourselves()
        engine = self.engine if self._tried else await self.pass_.wait_async()
        if self._tried or (engine is not None and engine.original and self.pass_.mode is not Mode.ON):
            engine = self._place_ourselves()
            self.pass_.send_to(engine)
        if engine is None or engine.original:  # nobody is known who could answer
            raise QueueUnavailable
        return engine

    def _place_ourselves(self) -> EngineSpec:
        """Calls are not Maestro's to place now (`maestro switch`): the engine with the fewest of ours."""
        engines = [e for e in self.relay.client.engines if e.serves(self.ticket) and e.engine_id not in self._tried]
        if not engines:
            raise NoEngineFits if self._tried else QueueUnavailable
        pinned = [e for e in engines if e.engine_id == self.ticket.pinned_engine]
        engine = min(pinned or engines, key=lambda e: (self.relay.unplaced[e.engine_id], e.engine_id))
        self.relay.unplaced[engine.engine_id] += 1
        self._unplaced = engine.engine_id
        return engine

    def _free_unplaced(self) -> None:
        if self._unplaced:
            self.relay.unplaced[self._unplaced] -= 1
            self._unplaced = ""

    # -- there and back ------------------------------------------------------------------------------------------------
    async def answer(self) -> Answer:
        """Wait, send, and wait for the first bytes; on another engine where one fails before them. Raises `RefusedCall`.

        Whatever ends this method ends the stage, or leaves its end to the answer's tap.
        """
        try:
            while True:
                try:
                    self.engine = await self._place()
                except NoEngineFits as e:
                    raise self.last_error or RefusedCall.of(e) from None  # every engine was tried: the last one's error
                except MaestroError as e:
                    raise RefusedCall.of(e) from None
                self.granted_monotonic_s = self.granted_monotonic_s or time.monotonic()
                found = await self._ask(self.engine)
                if isinstance(found, Answer):
                    return found
                self.last_error, moves = found
                if not moves:
                    self.finish(Usage(), ok=False)
                    raise self.last_error
        except BaseException:
            self.cancel()
            raise

    async def _ask(self, engine: EngineSpec) -> Answer | tuple[RefusedCall, bool]:
        """The answer, or what is said where there is none, and whether the call may move."""
        http, response = self.relay.http, None
        headers, content = self._outgoing(engine)
        request = http.build_request("POST", engine.url + self.request.path, content=content, headers=headers)
        if self.pass_ is not None:
            self.pass_.sent()
        try:
            response = await http.send(request, stream=True)
            if response.status_code != 200:
                return await self._failed(engine, response)
            return await self._answered(response)
        except httpx.TimeoutException as e:
            if isinstance(e, httpx.ConnectTimeout):
                return self._broken(), self._moves(engine_down=True)
            late = RefusedCall(504, "The engine did not answer in time.", kind="server_error", code="engine_timeout")
            return late, self._moves(engine_down=False, retry=True)  # slow, not dead
        except (httpx.HTTPError, httpx.StreamError):
            return self._broken(), self._moves(engine_down=True)
        except BaseException:
            if response is not None:
                with contextlib.suppress(Exception):
                    await response.aclose()
            raise

    def _outgoing(self, engine: EngineSpec) -> tuple[dict[str, str], bytes]:
        """What an engine gets: nothing of its caller's headers, its own key or token, our orders in its dialect."""
        grant = self.pass_.grant if self.pass_ is not None else None
        told = Said.of(self.ticket, grant, now_s=self.relay.client.now_s())
        sent = outward(engine.hints, told)
        body = merged(self.body, sent.body)
        body["model"] = engine.served_model or self.request.model
        key = engine.token or (os.environ.get(engine.api_key_env) if engine.api_key_env else None)
        headers = {
            **sent.headers,
            "content-type": "application/json",
            "accept": "text/event-stream" if self.request.body.get("stream") is True else "application/json",
            "accept-encoding": "identity",  # events are read along as they pass
            "x-request-id": self.ticket.stage_id,
            **({"authorization": f"Bearer {key}"} if key else {}),
        }
        return headers, json.dumps(body).encode()

    async def _answered(self, response: httpx.Response) -> Answer:
        kind = response.headers.get("content-type", "application/json")
        events = "event-stream" in kind
        plain = response.headers.get("content-encoding", "identity") in {"", "identity"}
        watcher = Watcher(self, events=events, hide_usage=self.hides_usage, legible=plain)
        tap = AsyncTap(response.stream, watcher)
        await tap.prime()
        headers = {"content-type": kind, "x-request-id": self.ticket.stage_id}
        if self.run is not None and self.run.run_id.isascii():
            headers["x-maestro-run"] = self.run.run_id.partition("/")[2]
        for name in ("content-encoding", "content-length"):
            if name in response.headers and not events:
                headers[name] = response.headers[name]
        if events:
            headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return Answer(headers=headers, events=events, tap=tap, call=self)

    async def _failed(self, engine: EngineSpec, response: httpx.Response) -> tuple[RefusedCall, bool]:
        """An engine's error: ours to mend elsewhere, the caller's to know, or nobody's business but ours."""
        status = response.status_code
        raw = bytearray()
        with contextlib.suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                async for chunk in response.aiter_bytes():
                    raw += chunk[: MAX_ERROR_BYTES - len(raw)]
        with contextlib.suppress(Exception):
            await response.aclose()
        if response.headers.get(DOWN_HEADER) == "down":  # as a connection refused, without the proxy
            return self._broken(), self._moves(engine_down=True)
        if status in {401, 403}:
            log.warning("gateway: engine %s refuses its key or token (%d)", engine.engine_id, status)
            expired = status == 401 and bool(engine.token)
            return self._broken(), expired and self._moves(engine_down=False, answered=True, retry=True)
        if status in _BUSY:  # a full queue is a signal, not a failure
            busy = RefusedCall(
                503,
                "All engines for this model are busy. Try again later.",
                kind="server_error",
                code="engines_busy",
                retry_after_s=BUSY_RETRY_S,
            )
            return busy, self._moves(engine_down=False, answered=True)
        if status in _RETRYABLE or status > 504:
            return self._broken(), self._moves(engine_down=False, answered=True, retry=True)
        if status in _CALLERS_FAULT or (status == 404 and "previous_response_id" in self.request.body):
            return _callers_fault(status, bytes(raw)), False
        log.warning("gateway: engine %s answered %d to %s", engine.engine_id, status, self.request.path)
        if status == 404:
            message = f"The model {self.request.model[:200]!r} does not answer {self.request.path}."
            return RefusedCall(400, message, code="unsupported_path", param="model"), False
        return self._broken(), False

    @staticmethod
    def _broken() -> RefusedCall:
        return RefusedCall(502, "The engine failed. Try again.", kind="server_error", code="engine_failed")

    def _moves(self, *, engine_down: bool, answered: bool = False, retry: bool = False) -> bool:
        """Whether this call goes to another engine, or to this one again."""
        if retry:
            self.retries_left -= 1
            if self.retries_left < 0:
                return False
        engine = cast("EngineSpec", self.engine)
        if self.pass_ is None or self.pass_.mode is not Mode.ON:
            self._tried.add(engine.engine_id)
            return True
        return self.pass_.requeue(engine_down=engine_down, answered=answered)

    # -- its end (`usage.Watched`) -------------------------------------------------------------------------------------
    def first_byte(self) -> None:
        self.first_byte_monotonic_s = time.monotonic()
        if self.pass_ is not None:
            self.pass_.first_byte()

    def grew(self, output_tokens: int) -> None:
        if self.pass_ is not None:
            self.pass_.grew(output_tokens)

    def finish(self, usage: Usage, *, ok: bool) -> None:
        if self.ended:
            return
        self.ended = True
        self.usage = usage
        output_tokens = usage.output_tokens or usage.content_events
        if self.pass_ is not None:
            self.pass_.finish(
                ok=ok,
                prompt_tokens=usage.prompt_tokens,
                output_tokens=output_tokens,
                output_estimated=not usage.output_tokens and usage.content_events > 0,
                cached_tokens=usage.cached_tokens,
                tool_calls=usage.tool_calls,
                engine_queue_s=usage.engine_queue_s,
                engine_ttft_s=usage.engine_ttft_s,
            )
        if usage.response_id and self.engine is not None:
            self.relay.remember(self.request.tenant, usage.response_id, self.engine.engine_id, self.run)
        self._leave(output_tokens, ok=ok)

    def cancel(self) -> None:
        if self.ended:
            return
        self.ended = True
        if self.pass_ is not None:
            self.pass_.cancel()
        self._leave(0, ok=False)

    def _leave(self, output_tokens: int, *, ok: bool) -> None:
        self._free_unplaced()
        if self.run is not None:
            t = self.ticket
            self.relay.runs.ended(self.run, node=t.node, visit=t.visit, role=t.role, output_tokens=output_tokens, ok=ok)


def _callers_fault(status: int, raw: bytes) -> RefusedCall:
    """What an engine says is wrong with a request, to the caller who made it."""
    body: Mapping[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError):
        body = mapping(json.loads(raw))
    error = mapping(body.get("error")) or body
    message, param = error.get("message"), error.get("param")
    return RefusedCall(
        status,
        message if isinstance(message, str) and message else "The engine refused this request.",
        param=param if isinstance(param, str) else None,
    )
