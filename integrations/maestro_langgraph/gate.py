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
import inspect
import logging
from collections.abc import Callable
from typing import Any, Final, cast
from urllib.parse import urlsplit

import openai
import openai._base_client as sdk
from openai._models import FinalRequestOptions

from maestro_agents.core import EngineSpec
from maestro_agents.errors import RunGone
from maestro_langgraph import engines
from maestro_langgraph.call import Call
from maestro_langgraph.quiet import warn_once

logger = logging.getLogger("maestro")

PATHS: Final = ("/chat/completions", "/completions", "/responses")

_Request = Callable[..., Any]
_originals: tuple[_Request, _Request] | None = None
_wrappers: tuple[_Request, _Request] | None = None
_active = False


def _begin(sdk_client: Any, options: FinalRequestOptions, *, is_async: bool) -> Call | None:
    """Open a stage for a call that is ours; None where the SDK's own method should just run."""
    try:
        suffix = suffix_of(options)
        if suffix is None:
            return None
        call = Call(sdk_client, options, suffix, is_async=is_async)
        if isinstance(call.body.get("model"), str) and call.body["model"] and call.open():
            return call
    except RunGone:
        raise
    except Exception as e:  # a bug of ours, or a setting that cannot be read: told once, and the call goes on
        warn_once("the gate", e)
    return None


def suffix_of(options: FinalRequestOptions) -> str | None:
    """The path below the engine's URL, for a call that is ours."""
    if options.method.lower() != "post" or not isinstance(options.json_data, dict):
        return None
    path = urlsplit(str(options.url)).path.rstrip("/")
    return next((known for known in PATHS if f"/{path.lstrip('/')}".endswith(known)), None)


def _prepare(call: Call, client_for: Callable[[EngineSpec], Any]) -> tuple[Any, Any] | None:
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
        call = _begin(self, options, is_async=False) if _active else None
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
        call = _begin(self, options, is_async=True) if _active else None
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


def _prime(call: Call, stream: Any) -> None:
    """Wait for the first bytes of a stream, so that an engine that dies before them costs the caller nothing."""
    try:
        stream.prime()
    except Exception as e:
        raise call.broken(e) from e


async def _prime_async(call: Call, stream: Any) -> None:
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
            logger.warning(
                "maestro: openai %s is not supported (%s): calls go out unmanaged", openai.__version__, problem
            )
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
