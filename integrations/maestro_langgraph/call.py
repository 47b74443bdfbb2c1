"""One LLM call on its way: its ticket, its pass, its request, its end.

What the request looks like is a subclass's business: `gate` has the SDK's method, `transport` an HTTP request, `limiter`
none at all. One call is served once: whatever of ours it meets on its way down lets it pass (`opened`).
"""

from __future__ import annotations

import asyncio
import math
import os
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Final, TypeVar, cast
from uuid import UUID
from weakref import WeakKeyDictionary, WeakSet

import openai
from langgraph.runtime import get_runtime

from maestro_agents.client import Client, Pass
from maestro_agents.core import EngineSpec, Mode, Ticket
from maestro_agents.errors import MaestroError, NoEngineFits, RunGone
from maestro_agents.hints import Said, Sent, merged, outward
from maestro_agents.predict.features import RunFacts, StageNumbers, estimate_tokens, max_output_tokens, stage_numbers
from maestro_agents.predict.prefix import prompt_blocks
from maestro_agents.predict.prompt import choices_asked
from maestro_agents.usage import Usage
from maestro_langgraph import adopted
from maestro_langgraph.identity import Caller, role_of, take_caller
from maestro_langgraph.options import Options, options_now, said_of_model
from maestro_langgraph.quiet import quietly, tell_once, warn_once
from maestro_langgraph.refusals import as_sdk_error
from maestro_langgraph.runs import Run, terms
from maestro_langgraph.stream import http_response, tap, unread_response

_T = TypeVar("_T")
_C = TypeVar("_C", bound="Call")

_BUSY: Final = frozenset({429, 503})
_RETRYABLE: Final = frozenset({408, 409, 500, 502, 504})
_REMEMBERED_RESPONSES: Final = 10_000

PROXY_SAYS: Final = "x-maestro-engine"
"""Header of an answer that the proxy in front of an engine gave itself (`maestro_serving.proxy.DOWN_HEADER`)."""

_answered_by: OrderedDict[str, str] = OrderedDict()
"""Response id -> the engine that holds its conversation (``previous_response_id``)."""

_on_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakSet[Call]] = WeakKeyDictionary()
"""Asynchronous calls that wait or are being answered, by the loop they live on."""


_served: ContextVar[bool] = ContextVar("maestro_served", default=False)


@contextmanager
def _serving() -> Generator[None]:
    """What leaves in this context now belongs to a call that has its grant already."""
    token = _served.set(True)
    try:
        yield
    finally:
        _served.reset(token)


limited: dict[UUID, Call] = {}
"""Calls that hold a grant while a client that is not ours makes the request, by their callback id (`limiter`)."""


def _clear() -> None:
    _answered_by.clear()
    limited.clear()
    _on_loop.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_clear)


class Call:
    """One LLM call on its way through the gate. ``httpx`` is the HTTP module that the caller's client is built on;
    None where no error of the SDK is ever made of ours.

    ``model_options`` is what was said of the model itself (`maestro.wrap_model`). It holds where nobody says more.
    """

    def __init__(
        self,
        body: dict[str, Any],
        *,
        suffix: str,
        url: str,
        httpx: ModuleType | None,
        retries: int,
        is_async: bool,
        model_options: Options | None = None,
    ) -> None:
        self.body = body
        self.suffix = suffix
        self.url = url
        self.httpx: Any = httpx
        self.caller: Caller = take_caller()
        self.model_options = model_options or said_of_model(self.caller.llm_run)
        if self.caller.run is None and self.model_options is not None:
            self.caller.run = adopted.find(self.model_options, self)
            self.caller.role = role_of(self.caller.role, self.model_options.agent or "")
        self.client = Client.current()
        self.beat, self.node_attempt = _runtime()
        self.engine: EngineSpec | None = None
        self.last_error: Exception | None = None
        self.retries_left = retries
        self.ended = False
        self.pass_: Pass | None = None
        #: The asynchronous calls of its loop, itself among them; None for a synchronous call.
        self.beside: WeakSet[Call] | None = None
        self.blocks_loop = _meets_loop(self, is_async=is_async)

    @property
    def run(self) -> Run | None:
        """The run that owns the call; None for an anonymous one, or one left behind by a run that ended well."""
        run = self.caller.run
        return None if run is not None and run.left_behind else run

    def open(self) -> bool:
        """Push the stage. False: it is none of ours. Raises `RunGone` where the run ended while we came."""
        run = self.run
        key = (run.thread or run.run_id) if run is not None else ""
        if self.client.mode is Mode.OFF:
            return False
        if run is not None and run.outcome and self.client.mode_of(key) is Mode.ON:
            raise RunGone
        ticket = self._ticket(run)
        self.pass_ = self.client.open(ticket, original_url=self.url, key=key)
        if self.pass_ is None:
            if run is not None:
                run.stages -= 1
            return False
        if run is not None and run.outcome and not run.left_behind and self.pass_.mode is Mode.ON:
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
            options, owner = options_now(self.model_options or Options()), None
            service_class, deadline_s, tenant = terms(options, self.client.settings)
            deadline_at_s = now_s + deadline_s
        previous = self.body.get("previous_response_id")
        visit, replayed = owner.visit(caller.node, caller.task) if owner else (0, False)
        siblings = owner.siblings(caller.task, caller.node) if owner else 0
        model, role = str(self.body["model"]), caller.role or options.agent or ""
        if not self.client.tells_features:
            numbers = StageNumbers(estimate_tokens(self.body), (), "")
        else:
            facts = RunFacts(model=model, role=role)
            if owner is not None:
                facts = owner.history.facts(
                    model=model,
                    role=role,
                    node=caller.node,
                    visit=visit,
                    calls_before=owner.stages - 1,
                    siblings=siblings,
                    node_attempt=self.node_attempt,
                    replayed=replayed,
                    spec=owner.workflow.spec if owner.workflow else "",
                )
            numbers = stage_numbers(self.body, facts, text=self.client.settings.text_features)
        return Ticket(
            stage_id=uuid.uuid4().hex,
            client_id=self.client.client_id,
            model=model,
            run_id=owner.run_id if owner else "",
            workflow=owner.workflow.fingerprint if owner and owner.workflow else "",
            node=caller.node,
            role=role,
            service_class=service_class,
            tenant=tenant,
            site=self.client.settings.site,
            deadline_at_s=deadline_at_s,
            run_started_at_s=owner.started_at_s if owner else now_s,
            pushed_at_s=now_s,
            due_at_s=now_s,
            prompt_tokens=numbers.prompt_tokens,
            max_tokens=max_output_tokens(self.body),
            choices=choices_asked(self.body),
            prefix=prompt_blocks(self.body, self.client.salt),
            visit=visit,
            step=caller.step,
            siblings=siblings,
            node_attempt=self.node_attempt,
            replayed=replayed,
            limit_at_s=now_s + owner.limit_s(caller.task) if owner else math.inf,
            nested=self.blocks_loop or bool(owner and owner.holds_stream(caller.task)),
            pinned_engine=_answered_by.get(previous, "") if isinstance(previous, str) else "",
            refuse_late=bool(options.refuse_late),
            streams=bool(self.body.get("stream")),
            features=numbers.features,
            sketch=numbers.sketch,
        )

    # -- waiting -----------------------------------------------------------------------------------------------------
    def wait(self) -> EngineSpec | None:
        """Wait for the grant on this thread. None: a bug of ours, the call goes where it would have gone."""
        self.engine = None
        while True:
            try:
                return self._granted(cast("Pass", self.pass_).wait(self.beat))
            except Exception as e:
                if not self._wait_failed(e):
                    return None

    async def wait_async(self) -> EngineSpec | None:
        self.engine = None
        while True:
            try:
                return self._granted(await cast("Pass", self.pass_).wait_async(self.beat))
            except Exception as e:
                if not self._wait_failed(e):
                    return None

    def _granted(self, engine: EngineSpec) -> EngineSpec:
        run = self.run
        managed = cast("Pass", self.pass_).mode is Mode.ON
        if run is not None and run.outcome and managed:
            self.cancel()
            raise RunGone
        if run is not None and not managed:
            run.observed = True
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
            raise self.refusal(error) from None
        else:
            warn_once("the gate", error)
        self.cancel()
        return False

    def refusal(self, error: MaestroError) -> MaestroError:
        """A refusal as the caller's handlers know it."""
        return as_sdk_error(error, self.httpx, self.url)

    # -- sending -----------------------------------------------------------------------------------------------------
    def serve(self, send: Callable[[], Any]) -> Any:
        """Wait, send, and watch the answer; on another engine where one fails before its first byte.

        ``send`` sends to `engine` (to the call's own URL where `to_original`) and returns what the caller gets, or raises
        the SDK's own error. Whatever ends this method ends the stage, or leaves its end to the answer that streams.
        """
        try:
            while True:
                self.wait()
                try:
                    with _serving():
                        result = send()
                    stream = self.watch(result, is_async=False)
                    if stream is not None:
                        if not self.to_original:
                            self._prime(stream)
                        self.reading()
                except Exception as e:
                    if not self.again(e):
                        raise
                else:
                    return result
        except BaseException:
            self.cancel()
            raise

    async def serve_async(self, send: Callable[[], Awaitable[Any]]) -> Any:
        """The same on an event loop."""
        try:
            while True:
                await self.wait_async()
                try:
                    with _serving():
                        result = await send()
                    stream = self.watch(result, is_async=True)
                    if stream is not None:
                        if not self.to_original:
                            await self._prime_async(stream)
                        self.reading()
                except Exception as e:
                    if not self.again(e):
                        raise
                else:
                    return result
        except BaseException:
            self.cancel()
            raise

    def prepare(self, make: Callable[[EngineSpec], _T]) -> _T | None:
        """What ``make`` makes for the granted engine, to be sent now; None where it goes as the caller made it."""
        made: _T | None = None
        if not self.to_original:
            try:
                made = make(cast("EngineSpec", self.engine))
            except Exception as e:  # e.g. an engine URL that no client takes
                warn_once("preparing a request", e)
                self.cancel()
                self.engine = None
                return None
        self.sent()
        return made

    def added(self) -> Sent:
        """What an engine gets beside what the caller said: its own name for the model, and of the call what its dialect has
        words for. Where the caller put something beside such a word, it is in the body too.
        """
        engine, pass_ = cast("EngineSpec", self.engine), cast("Pass", self.pass_)
        now_s, run = self.client.now_s(), self.run
        call = Said.of(pass_.ticket, pass_.grant, now_s=now_s, session_id=run.thread if run is not None else "")
        told = outward(engine.hints, call, now_s=now_s)
        own: dict[str, Any] = {"model": engine.served_model} if engine.served_model else {}
        own |= merged({name: self.body[name] for name in told.body if name in self.body}, told.body)
        if self.adds_usage:
            own["stream_options"] = {**(self.body.get("stream_options") or {}), "include_usage": True}
        return Sent(body=own, headers=told.headers)

    def sent(self) -> None:
        with quietly("noting a request"):
            cast("Pass", self.pass_).sent()

    @property
    def adds_usage(self) -> bool:
        """Whether Maestro asks for a usage chunk that the caller did not ask for."""
        options: Mapping[str, Any] = self.body.get("stream_options") or {}
        asked = options.get("include_usage")
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
            if error.response.headers.get(PROXY_SAYS) == "down":  # as a connection refused, without the proxy
                return pass_.requeue(engine_down=True)
            if error.status_code == 401 and self.engine is not None and self.engine.token:
                # it expired on its way here (a process that was stopped for a while): the next one is newer
                return self._spend_retry() and pass_.requeue(engine_down=False, answered=True)
            if error.status_code in _BUSY:  # a full queue is a signal, not a failure
                return pass_.requeue(engine_down=False, answered=True)
            if error.status_code in _RETRYABLE or error.status_code > 504:
                return self._spend_retry() and pass_.requeue(engine_down=False, answered=True)
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

    def _prime(self, stream: Any) -> None:
        """Wait for the first bytes of a stream, so that an engine that dies before them costs the caller nothing."""
        try:
            stream.prime()
        except Exception as e:
            raise self.broken(e) from e

    async def _prime_async(self, stream: Any) -> None:
        try:
            await stream.prime()
        except Exception as e:
            raise self.broken(e) from e

    def broken(self, error: Exception) -> openai.APIConnectionError:
        """The SDK's error for a request or a stream that broke before its first byte."""
        request = self.httpx.Request("POST", self.url)
        if "Timeout" in type(error).__name__:
            return openai.APITimeoutError(request=request)
        return openai.APIConnectionError(request=request)

    def first_byte(self) -> None:
        with quietly("noting the first byte"):
            cast("Pass", self.pass_).first_byte()

    def grew(self, output_tokens: int) -> None:
        """So many tokens of the answer have passed."""
        if self.pass_ is None:
            return
        try:  # not `quietly`: this is for every chunk
            self.pass_.grew(output_tokens)
        except Exception as e:
            warn_once("a growing reservation", e)

    def finish(self, usage: Usage, *, ok: bool) -> None:
        """End the stage. The first end counts."""
        if self.ended:
            return
        self.ended = True
        try:
            self._forget_stream()
            if usage.response_id and self.engine is not None and not self.engine.original:
                _remember(usage.response_id, self.engine.engine_id)
            cast("Pass", self.pass_).finish(
                ok=ok,
                prompt_tokens=usage.prompt_tokens,
                output_tokens=usage.output_tokens or usage.content_events,
                output_estimated=not usage.output_tokens and usage.content_events > 0,
                cached_tokens=usage.cached_tokens,
                tool_calls=usage.tool_calls,
                engine_queue_s=usage.engine_queue_s,
                engine_ttft_s=usage.engine_ttft_s,
            )
            self._remember_output(usage.output_tokens or usage.content_events, ok=ok)
        except Exception as e:  # ours
            warn_once("finishing a stage", e)
            with quietly("dropping a stage"):
                cast("Pass", self.pass_).drop()

    def _remember_output(self, output_tokens: int, *, ok: bool) -> None:
        """Let the run's later calls know how long this answer was, where it came to its end and its length is known."""
        ticket, run = cast("Pass", self.pass_).ticket, self.run
        if run is not None and ok and output_tokens:
            run.history.ended(node=ticket.node, visit=ticket.visit, role=ticket.role, output_tokens=output_tokens)

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
        if self.beside is not None:
            self.beside.discard(self)
        if self.caller.run is not None:
            self.caller.run.open_streams.pop(self, None)
            adopted.seen(self.caller.run)


def opened(make: Callable[[], _C | None]) -> _C | None:
    """Make a call and open its stage. None: it is none of ours, or is served already, and should just go on."""
    try:
        call = None if _served.get() else make()
        if call is None or call.caller.llm_run in limited:
            return None
        if isinstance(call.body.get("model"), str) and call.body["model"] and call.open():
            return call
    except RunGone:
        raise
    except Exception as e:  # a bug of ours, or a setting that cannot be read: told once, and the call goes on
        warn_once("the gate", e)
    return None


def _meets_loop(call: Call, *, is_async: bool) -> bool:
    """Note which loop an asynchronous call lives on. True: a synchronous one would stop a loop that calls live on.

    Those could not end, nor free their engines, while it waits: so it must not wait behind them.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return False
    if is_async:
        call.beside = _on_loop.get(loop)
        if call.beside is None:
            call.beside = _on_loop[loop] = WeakSet()
        call.beside.add(call)
        return False
    if not _on_loop.get(loop):
        return False
    tell_once(
        "a synchronous model call in an asynchronous node stops the event loop for all others: use ainvoke or astream"
    )
    return True


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


def _runtime() -> tuple[Callable[[], None] | None, int]:
    """What LangGraph says of the node that calls: a sign of life to give (queueing must not look like idling), its try."""
    try:
        runtime = get_runtime()
        beat = runtime.heartbeat
        attempt = runtime.execution_info.node_attempt if runtime.execution_info else 1
    except Exception:  # not in a graph, or an older LangGraph
        return None, 1

    def guarded() -> None:
        with quietly("the heartbeat"):
            beat()

    return guarded, attempt
