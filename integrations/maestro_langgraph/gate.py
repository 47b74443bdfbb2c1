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
from collections.abc import Callable, Mapping
from typing import Any, cast

import openai
import openai._base_client as sdk
from openai._models import FinalRequestOptions

from maestro_agents.core import EngineSpec
from maestro_langgraph import engines
from maestro_langgraph.call import Call, opened
from maestro_langgraph.refusals import httpx_of

logger = logging.getLogger("maestro")

_Request = Callable[..., Any]
_originals: tuple[_Request, _Request] | None = None
_wrappers: tuple[_Request, _Request] | None = None
_active = False


class SdkCall(Call):
    """A call that stopped in the SDK's ``request``."""

    def __init__(self, sdk_client: Any, options: FinalRequestOptions, suffix: str, *, is_async: bool) -> None:
        self.sdk_client = sdk_client
        self.options = options
        # as it would leave: ``extra_body`` wins over the arguments
        extra = cast("Mapping[str, Any]", options.extra_json or {})
        super().__init__(
            {**cast("dict[str, Any]", options.json_data), **extra},
            suffix=suffix,
            url=str(sdk_client.base_url),
            httpx=httpx_of(sdk_client),
            retries=options.get_max_retries(sdk_client.max_retries),
            is_async=is_async,
        )

    def outgoing(self, engine: EngineSpec) -> Any:
        """The request as the granted engine gets it."""
        given = self.options.timeout
        timeout = self.sdk_client.timeout if isinstance(given, openai.NotGiven) else given
        return engines.outgoing(self.options, engine=engine, suffix=self.suffix, timeout=timeout, added=self.added())


def _begin(sdk_client: Any, options: FinalRequestOptions, *, is_async: bool) -> SdkCall | None:
    """Open a stage for a call that is ours; None where the SDK's own method should just run."""

    def make() -> SdkCall | None:
        suffix = suffix_of(options)
        return None if suffix is None else SdkCall(sdk_client, options, suffix, is_async=is_async)

    return opened(make)


def suffix_of(options: FinalRequestOptions) -> str | None:
    """The path below the engine's URL, for a call that is ours."""
    if options.method.lower() != "post" or not isinstance(options.json_data, dict):
        return None
    return engines.suffix_of(str(options.url))


def _wrap_sync(original: _Request) -> _Request:
    @functools.wraps(original)
    def request(self: Any, cast_to: Any, options: FinalRequestOptions, *args: Any, **kwargs: Any) -> Any:
        call = _begin(self, options, is_async=False) if _active else None
        if call is None:
            return original(self, cast_to, options, *args, **kwargs)

        def send() -> Any:
            prepared = call.prepare(lambda engine: (engines.sync_client(engine), call.outgoing(engine)))
            through, sent = prepared or (self, options)
            return original(through, cast_to, sent, *args, **kwargs)

        return call.serve(send)

    return request


def _wrap_async(original: _Request) -> _Request:
    @functools.wraps(original)
    async def request(self: Any, cast_to: Any, options: FinalRequestOptions, *args: Any, **kwargs: Any) -> Any:
        call = _begin(self, options, is_async=True) if _active else None
        if call is None:
            return await original(self, cast_to, options, *args, **kwargs)

        async def send() -> Any:
            prepared = call.prepare(lambda engine: (engines.async_client(engine), call.outgoing(engine)))
            through, sent = prepared or (self, options)
            return await original(through, cast_to, sent, *args, **kwargs)

        return await call.serve_async(send)

    return request


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
