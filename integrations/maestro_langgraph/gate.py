"""The gate: every LLM call of the OpenAI SDK waits here for its grant, then goes to the engine that was granted.

It is put around one method of the SDK, ``request`` of the synchronous and of the asynchronous client: above the client's
timeouts (waiting does not count), with the body still a dictionary. That method is not a public path, so `install` checks
its shape first and refuses with one warning where it is not what it was; `uninstall` puts back exactly what was there.

What holds for every call:

* ``Client.open`` says it is none of ours: the SDK's own method runs, untouched.
* A bug of ours (any exception that is no `MaestroError`) never fails the call: it goes where it would have gone.
* A refusal is a `MaestroError` and the SDK's own error in one, so existing handlers work. The SDK never retries it.
* Before the first byte the call may move to another engine; after it nothing is replayed.
* Whatever ends the call (answer, error, cancellation, an abandoned stream) ends the stage, once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final, cast
from urllib.parse import urlsplit

import openai
import openai._base_client as sdk
from langgraph.runtime import get_runtime
from openai._models import FinalRequestOptions

from maestro_agents.client import Client, Pass
from maestro_agents.core import EngineSpec, Ticket
from maestro_agents.errors import (
    MaestroError,
    NoEngineFits,
    QueueFull,
    QueueUnavailable,
    RunGone,
    StageRefused,
    WaitTooLong,
)
from maestro_agents.predict.features import estimate_tokens, max_output_tokens, stage_features
from maestro_langgraph import engines, identity
from maestro_langgraph.identity import Caller, Run, quietly, warn_once
from maestro_langgraph.stream import Usage, http_response, tap, unread_response

logger = logging.getLogger("maestro")

PATHS: Final = ("/chat/completions", "/completions", "/responses")
_BUSY: Final = frozenset({429, 503})
_RETRYABLE: Final = frozenset({408, 409, 500, 502, 504})
_REMEMBERED_RESPONSES: Final = 10_000

_answered_by: OrderedDict[str, str] = OrderedDict()
"""Response id -> the engine that holds its conversation (``previous_response_id``)."""


# -- refusals: ours and the SDK's in one --------------------------------------------------------------------------------
class QueueFullError(QueueFull, openai.RateLimitError):
    """The queue for this model is full (status 429, ``retry-after``)."""


class StageRefusedError(StageRefused, openai.RateLimitError):
    """The deadline of this run cannot be met any more (status 429, ``retry-after``)."""


class WaitTooLongError(WaitTooLong, openai.APITimeoutError):
    """The stage waited longer than MAESTRO_MAX_WAIT_S for an engine."""


class QueueUnavailableError(QueueUnavailable, openai.APIConnectionError):
    """Redis cannot be reached, and MAESTRO_ON_OUTAGE says to fail then."""


class NoEngineFitsError(NoEngineFits, openai.BadRequestError):
    """No engine of the fleet could ever serve this stage (status 400)."""


def as_sdk_error(error: MaestroError, sdk_client: Any, url: str) -> MaestroError:
    """Return the same refusal in a class that is also the SDK's, so that the caller's handlers know it."""
    httpx = _httpx_of(sdk_client)
    request = httpx.Request("POST", url)
    text = str(error)
    if isinstance(error, QueueFull | StageRefused):
        kind = QueueFullError if isinstance(error, QueueFull) else StageRefusedError
        response = httpx.Response(429, headers={"retry-after": f"{error.retry_after_s:.1f}"}, request=request)
        refusal = cast("QueueFullError", kind.__new__(kind))
        openai.RateLimitError.__init__(refusal, text, response=response, body=None)
        refusal.retry_after_s = error.retry_after_s
        return refusal
    if isinstance(error, WaitTooLong):
        late = WaitTooLongError.__new__(WaitTooLongError)
        openai.APITimeoutError.__init__(late, request=request)
        late.message, late.args = text, (text,)
        return late
    if isinstance(error, QueueUnavailable):
        out = QueueUnavailableError.__new__(QueueUnavailableError)
        openai.APIConnectionError.__init__(out, message=text, request=request)
        return out
    if isinstance(error, NoEngineFits):
        misfit = NoEngineFitsError.__new__(NoEngineFitsError)
        openai.BadRequestError.__init__(misfit, text, response=httpx.Response(400, request=request), body=None)
        return misfit
    return error


def _httpx_of(sdk_client: Any) -> Any:
    """The HTTP module that the caller's client is built on: ``httpx2`` since openai 3, ``httpx`` before."""
    families = [cls.__module__.split(".")[0] for cls in type(sdk_client._client).__mro__]
    return importlib.import_module(next((f for f in families if f in {"httpx", "httpx2"}), "httpx"))


# -- one call ------------------------------------------------------------------------------------------------------------
class _Call:
    """One LLM call on its way through the gate."""

    def __init__(self, sdk_client: Any, options: FinalRequestOptions, suffix: str) -> None:
        self.sdk_client = sdk_client
        self.options = options
        self.suffix = suffix
        self.url = str(sdk_client.base_url)
        self.body = _body(options)
        self.caller: Caller = identity.take_caller()
        self.client = Client.current()
        self.beat = _heartbeat()
        self.engine: EngineSpec | None = None
        self.last_error: Exception | None = None
        self.retries_left = options.get_max_retries(sdk_client.max_retries)
        self.ended = False
        self.pass_: Pass | None = None

    @property
    def run(self) -> Run | None:
        """The run that owns the call; None for an anonymous one, or one left behind by a run that ended well."""
        run = self.caller.run
        return None if run is not None and run.outcome == "done" else run

    def open(self) -> bool:
        """Push the stage. False: it is none of ours. Raises `RunGone` where the run ended while we came."""
        run = self.run
        if run is not None and run.outcome:
            raise RunGone
        ticket = self._ticket(run)
        self.pass_ = self.client.open(ticket, original_url=self.url)
        if self.pass_ is None:
            if run is not None:
                run.stages -= 1
            return False
        if run is not None and run.outcome and run.outcome != "done":
            self.cancel()
            raise RunGone
        return True

    def _ticket(self, run: Run | None) -> Ticket:
        now_s = self.client.now_s()
        caller = self.caller
        if run is not None:
            run.settle(self.client)
            options, owner = run.options, run
            service_class, deadline_at_s, tenant = run.service_class, run.deadline_at_s, run.tenant
            if run.workflow is not None:
                self.client.describe(run.workflow.fingerprint, run.workflow.spec)
        else:
            options, owner = identity.current_options().over(identity.defaults), None
            service_class, deadline_s, tenant = identity.terms(options, self.client.settings)
            deadline_at_s = now_s + deadline_s
        previous = self.body.get("previous_response_id")
        return Ticket(
            stage_id=uuid.uuid4().hex,
            client_id=self.client.client_id,
            model=str(self.body["model"]),
            run_id=owner.run_id if owner else "",
            workflow=owner.workflow.fingerprint if owner and owner.workflow else "",
            node=caller.node,
            role=caller.role or options.agent or "",
            service_class=service_class,
            tenant=tenant,
            deadline_at_s=deadline_at_s,
            run_started_at_s=owner.started_at_s if owner else now_s,
            pushed_at_s=now_s,
            prompt_tokens=estimate_tokens(self.body),
            max_tokens=max_output_tokens(self.body),
            visit=owner.visit(caller.node) if owner else 0,
            step=caller.step,
            nested=bool(owner and owner.holds_stream(caller.task)),
            pinned_engine=_answered_by.get(previous, "") if isinstance(previous, str) else "",
            refuse_late=bool(options.refuse_late),
            features=stage_features(self.body),
        )

    # -- waiting -----------------------------------------------------------------------------------------------------
    def wait(self) -> EngineSpec | None:
        """Wait for the grant on this thread. None: a bug of ours, the call goes where it would have gone."""
        while True:
            try:
                return self._granted(cast("Pass", self.pass_).wait(self.beat))
            except Exception as e:
                if not self._wait_failed(e):
                    return None

    async def wait_async(self) -> EngineSpec | None:
        while True:
            try:
                return self._granted(await cast("Pass", self.pass_).wait_async(self.beat))
            except Exception as e:
                if not self._wait_failed(e):
                    return None

    def _granted(self, engine: EngineSpec) -> EngineSpec:
        run = self.run
        if run is not None and run.outcome:
            self.cancel()
            raise RunGone
        self.engine = engine
        return engine

    def _wait_failed(self, error: Exception) -> bool:
        """True: wait again. False: pass through. Else raises what the caller should see."""
        if isinstance(error, RunGone) and self.run is None and self.caller.run is not None:
            # left in the background by a run that ended well: its owner does not want it withdrawn
            self.caller.run = None
            if self.open():
                return True
        elif isinstance(error, MaestroError):
            self.cancel()
            if self.last_error is not None and isinstance(error, NoEngineFits):
                raise self.last_error from None  # every engine was tried: what the last one said stands
            raise as_sdk_error(error, self.sdk_client, self.url) from None
        else:
            warn_once("the gate", error)
        self.cancel()
        return False

    # -- sending -----------------------------------------------------------------------------------------------------
    def outgoing(self) -> Any:
        """The request as the engine gets it, and a note that it leaves now."""
        engine, pass_ = cast("EngineSpec", self.engine), cast("Pass", self.pass_)
        own: dict[str, Any] = {"priority": pass_.grant.priority if pass_.grant else 0}
        if self.adds_usage:
            own["stream_options"] = {**(self.body.get("stream_options") or {}), "include_usage": True}
        given = self.options.timeout
        timeout = self.sdk_client.timeout if isinstance(given, openai.NotGiven) else given
        sent = engines.outgoing(self.options, engine, suffix=self.suffix, timeout=timeout, extra=own)
        self.sent()
        return sent

    def sent(self) -> None:
        with quietly("noting a request"):
            cast("Pass", self.pass_).sent()

    @property
    def adds_usage(self) -> bool:
        """Whether Maestro asks for a usage chunk that the caller did not ask for."""
        asked = (self.body.get("stream_options") or {}).get("include_usage")
        return bool(self.body.get("stream")) and not asked and self.suffix != "/responses" and not self.to_original

    @property
    def to_original(self) -> bool:
        return self.engine is None or self.engine.original

    def again(self, error: Exception) -> bool:
        """After an error before the first byte: back into the queue (True), or the end of this call (False)."""
        try:
            if not self.to_original and self._may_move(error):
                self.last_error = error
                return True
        except Exception as e:  # ours: the engine's error stands
            warn_once("a retry", e)
        self.finish(Usage(), ok=False)
        return False

    def _may_move(self, error: Exception) -> bool:
        pass_ = cast("Pass", self.pass_)
        if isinstance(error, openai.APITimeoutError) and "Connect" not in type(error.__cause__).__name__:
            return self._spend_retry() and pass_.requeue(engine_down=False)  # slow, not dead
        if isinstance(error, openai.APIConnectionError):
            return pass_.requeue(engine_down=True)
        if isinstance(error, openai.APIStatusError):
            if error.status_code in _BUSY:  # a full queue is a signal, not a failure
                return pass_.requeue(engine_down=False)
            if error.status_code in _RETRYABLE or error.status_code > 504:
                return self._spend_retry() and pass_.requeue(engine_down=False)
        return False

    def _spend_retry(self) -> bool:
        self.retries_left -= 1
        return self.retries_left >= 0

    # -- answered ----------------------------------------------------------------------------------------------------
    def watch(self, result: object, *, is_async: bool) -> Any | None:
        """Note the answer. Returns the tap where its body is still to come, None where it is complete."""
        with quietly("watching an answer"):
            response = unread_response(result)
            if response is not None:
                return tap(response, self, hide_usage=self.adds_usage, is_async=is_async)
        usage = Usage()
        with quietly("reading usage"):
            self.first_byte()
            usage.absorb(_answer(result))
        self.finish(usage, ok=True)
        return None

    def reading(self) -> None:
        """Note that the caller reads a streaming answer from now on: what it calls meanwhile is nested."""
        run = self.run
        if run is not None and self.caller.task and not self.ended:
            run.open_streams[self] = self.caller.task

    def broken(self, error: Exception) -> Exception:
        """The SDK's error for a stream that broke before its first byte."""
        request = _httpx_of(self.sdk_client).Request("POST", self.url)
        if "Timeout" in type(error).__name__:
            return openai.APITimeoutError(request=request)
        return openai.APIConnectionError(request=request)

    def first_byte(self) -> None:
        with quietly("noting the first byte"):
            cast("Pass", self.pass_).first_byte()

    def finish(self, usage: Usage, *, ok: bool) -> None:
        """End the stage. The first end counts."""
        if self.ended:
            return
        self.ended = True
        with quietly("finishing a stage"):
            self._forget_stream()
            if usage.response_id and self.engine is not None and not self.engine.original:
                _remember(usage.response_id, self.engine.engine_id)
            cast("Pass", self.pass_).finish(
                ok=ok,
                prompt_tokens=usage.prompt_tokens,
                output_tokens=usage.output_tokens,
                cached_tokens=usage.cached_tokens,
                tool_calls=usage.tool_calls,
                engine_queue_s=usage.engine_queue_s,
                engine_ttft_s=usage.engine_ttft_s,
            )

    def cancel(self) -> None:
        """Withdraw the stage, wherever it is. After an end it does nothing."""
        if self.ended:
            return
        self.ended = True
        with quietly("withdrawing a stage"):
            self._forget_stream()
            if self.pass_ is not None:
                self.pass_.cancel()

    def _forget_stream(self) -> None:
        if self.caller.run is not None:
            self.caller.run.open_streams.pop(self, None)


def _begin(sdk_client: Any, options: FinalRequestOptions) -> _Call | None:
    """Open a stage for a call that is ours; None where the SDK's own method should just run."""
    try:
        suffix = _suffix(options)
        if suffix is None:
            return None
        call = _Call(sdk_client, options, suffix)
        if isinstance(call.body.get("model"), str) and call.body["model"] and call.open():
            return call
    except RunGone:
        raise
    except Exception as e:  # a bug of ours, or a setting that cannot be read: told once, and the call goes on
        warn_once("the gate", e)
    return None


def _suffix(options: FinalRequestOptions) -> str | None:
    """The path below the engine's URL, for a call that is ours."""
    if options.method.lower() != "post" or not isinstance(options.json_data, dict):
        return None
    path = urlsplit(str(options.url)).path.rstrip("/")
    return next((known for known in PATHS if f"/{path.lstrip('/')}".endswith(known)), None)


def _body(options: FinalRequestOptions) -> dict[str, Any]:
    """The body as it would leave: ``extra_body`` wins over the arguments."""
    return {**cast("dict[str, Any]", options.json_data), **cast("Mapping[str, Any]", options.extra_json or {})}


def _answer(result: object) -> Mapping[str, Any]:
    response = http_response(result)
    if response is not None:
        found: Any = response.json()
    elif hasattr(result, "model_dump"):
        found = {k: _plain(getattr(result, k, None)) for k in ("id", "object", "usage", "metrics", "error")}
        found["choices"] = [_plain(c) for c in getattr(result, "choices", None) or ()]
        found["output"] = [_plain(o) for o in getattr(result, "output", None) or ()]
    else:
        found = result
    return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}


def _plain(value: Any) -> Any:
    return value.model_dump(warnings=False) if hasattr(value, "model_dump") else value


def _remember(response_id: str, engine_id: str) -> None:
    _answered_by[response_id] = engine_id
    while len(_answered_by) > _REMEMBERED_RESPONSES:
        _answered_by.popitem(last=False)


def _heartbeat() -> Callable[[], None] | None:
    """LangGraph's sign of life for the node that waits: queueing must not look like idling."""
    try:
        beat = get_runtime().heartbeat
    except Exception:  # not in a graph
        return None

    def guarded() -> None:
        with quietly("the heartbeat"):
            beat()

    return guarded


# -- the seam ------------------------------------------------------------------------------------------------------------
_Request = Callable[..., Any]
_originals: tuple[_Request, _Request] | None = None
_wrappers: tuple[_Request, _Request] | None = None
_active = False


def _prepare(call: _Call, client_for: Callable[[EngineSpec], Any]) -> tuple[Any, Any] | None:
    """Our client and the request as its engine gets it; None where it should go as the caller made it."""
    if call.to_original:
        call.sent()
        return None
    try:
        return client_for(cast("EngineSpec", call.engine)), call.outgoing()
    except Exception as e:  # e.g. an engine URL that no client takes
        warn_once("preparing a request", e)
        call.cancel()
        call.engine = None
        return None


def _wrap_sync(original: _Request) -> _Request:
    @functools.wraps(original)
    def request(self: Any, cast_to: Any, options: FinalRequestOptions, *args: Any, **kwargs: Any) -> Any:
        call = _begin(self, options) if _active else None
        if call is None:
            return original(self, cast_to, options, *args, **kwargs)
        try:
            while True:
                call.wait()
                prepared = _prepare(call, engines.sync_client)
                through, sent = prepared or (self, options)
                try:
                    result = original(through, cast_to, sent, *args, **kwargs)
                    stream = call.watch(result, is_async=False)
                    if stream is not None:
                        if prepared:
                            _prime(call, stream)
                        call.reading()
                except Exception as e:
                    if not call.again(e):
                        raise
                else:
                    return result
        except BaseException:
            call.cancel()
            raise

    return request


def _wrap_async(original: _Request) -> _Request:
    @functools.wraps(original)
    async def request(self: Any, cast_to: Any, options: FinalRequestOptions, *args: Any, **kwargs: Any) -> Any:
        call = _begin(self, options) if _active else None
        if call is None:
            return await original(self, cast_to, options, *args, **kwargs)
        try:
            while True:
                await call.wait_async()
                prepared = _prepare(call, engines.async_client)
                through, sent = prepared or (self, options)
                try:
                    result = await original(through, cast_to, sent, *args, **kwargs)
                    stream = call.watch(result, is_async=True)
                    if stream is not None:
                        if prepared:
                            await _prime_async(call, stream)
                        call.reading()
                except Exception as e:
                    if not call.again(e):
                        raise
                else:
                    return result
        except BaseException:
            call.cancel()
            raise

    return request


def _prime(call: _Call, stream: Any) -> None:
    """Wait for the first bytes of a stream, so that an engine that dies before them costs the caller nothing."""
    try:
        stream.prime()
    except Exception as e:
        raise call.broken(e) from e


async def _prime_async(call: _Call, stream: Any) -> None:
    try:
        await stream.prime()
    except Exception as e:
        raise call.broken(e) from e


def self_check() -> str:
    """Say what about this version of the SDK is not as the gate needs it; empty where all is well."""
    for client in (sdk.SyncAPIClient, sdk.AsyncAPIClient):
        names = list(inspect.signature(client.request).parameters)
        if names[:3] != ["self", "cast_to", "options"] or "stream" not in names:
            return f"{client.__name__}.request({', '.join(names)}) is not what it was"
    if not inspect.iscoroutinefunction(inspect.unwrap(sdk.AsyncAPIClient.request)):
        return "AsyncAPIClient.request is no coroutine function"
    needed = {"method", "url", "params", "headers", "max_retries", "timeout", "json_data", "extra_json"}
    if missing := needed - set(FinalRequestOptions.model_fields):
        return f"FinalRequestOptions has no {', '.join(sorted(missing))}"
    return ""


def install() -> bool:
    """Put the gate around the SDK; again changes nothing. False, with one warning, where the SDK is not as expected."""
    global _originals, _wrappers, _active
    if _originals is None:
        if problem := self_check():
            logger.warning("maestro: openai %s is not supported (%s): calls go out unmanaged", openai.__version__, problem)
            return False
        _originals = (sdk.SyncAPIClient.request, sdk.AsyncAPIClient.request)
        _wrappers = (_wrap_sync(_originals[0]), _wrap_async(_originals[1]))
        sdk.SyncAPIClient.request, sdk.AsyncAPIClient.request = _wrappers  # pyright: ignore[reportAttributeAccessIssue]
    _active = True
    return True


def uninstall() -> None:
    """Put back what was there. Where somebody wrapped the method after us, ours stays beneath and lets all through."""
    global _originals, _wrappers, _active
    _active = False
    if _originals is None or _wrappers is None:
        return
    clients: tuple[Any, Any] = (sdk.SyncAPIClient, sdk.AsyncAPIClient)
    if all(c.request is w for c, w in zip(clients, _wrappers, strict=True)):
        for client, original in zip(clients, _originals, strict=True):
            client.request = original
        _originals = _wrappers = None


def _forget() -> None:
    _answered_by.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
