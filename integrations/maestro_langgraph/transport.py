"""The gate below a model's own SDK client: HTTP transports, for `maestro.wrap_model`. Nothing is patched.

A transport takes the place of the connection pool in the client's ``http_client``, which is a public argument of the SDK.
It waits for the grant, sends the rewritten request to the engine through a client of ours, and watches the answer. What goes
to its own URL goes through the very client that the model had: its pool, proxies, auth, hooks and timeouts.

Seen from here each of the SDK's own retries is a request, and so a stage, of its own. They are rare: what fails on an
engine is tried again here, and its error leaves with the word that the SDK should not try again.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final, cast
from weakref import WeakSet

import openai

from maestro_agents.core import EngineSpec
from maestro_agents.errors import MaestroError, RunGone
from maestro_langgraph import engines
from maestro_langgraph.call import Call, opened
from maestro_langgraph.options import Options
from maestro_langgraph.refusals import RunGoneError, httpx_of

_NO_RETRY: Final = {"x-should-retry": "false"}

_ours: WeakSet[Any] = WeakSet()


class _Answered(openai.APIStatusError):
    """A server answered with an error status: a refusal of its own, handed on as it came."""


class HttpCall(Call):
    """A call that stopped in a transport."""

    def __init__(
        self,
        request: Any,
        body: dict[str, Any],
        suffix: str,
        *,
        httpx: ModuleType,
        retries: int,
        options: Options,
        is_async: bool,
    ) -> None:
        self.request = request
        super().__init__(
            body,
            suffix=suffix,
            url=str(request.url.copy_with(query=None)).rstrip("/").removesuffix(suffix) + "/",
            httpx=httpx,
            retries=retries,
            is_async=is_async,
            model_options=options,
        )

    def outgoing(self, engine: EngineSpec) -> Any:
        """The request as an engine gets it."""
        added = self.added()
        return self.httpx.Request(
            "POST",
            engine.url.rstrip("/") + self.suffix,
            headers={**engines.headers_for(engine, self.request.headers), **added.headers},
            content=json.dumps({**self.body, **added.body}, ensure_ascii=False, separators=(",", ":")).encode(),
            extensions={k: v for k, v in self.request.extensions.items() if k == "timeout"},
        )

    def refusal(self, error: MaestroError) -> MaestroError:
        return RunGoneError(str(error)) if isinstance(error, RunGone) else super().refusal(error)

    def streams(self, response: Any) -> bool:
        """Whether the answer comes bit by bit: then it is watched on its way, else it is read here."""
        return bool(self.body.get("stream")) and response.status_code < 400

    def answer(self, response: Any, content: bytes | None) -> Any:
        """The response for the caller's client. Raises `_Answered` where it is an error."""
        failed = response.status_code >= 400
        headers = [*response.headers.raw]
        if failed and not self.to_original:  # what could be done about it was done here
            headers += [(k.encode(), v.encode()) for k, v in _NO_RETRY.items()]
        body = {"stream": response.stream} if content is None else {"content": content}
        made = self.httpx.Response(response.status_code, headers=headers, extensions=response.extensions, **body)
        if failed:
            made.request = self.request
            raise _Answered(f"status {made.status_code}", response=made, body=None)
        return made


class _Transport:
    """What both have in common. ``inner`` is the HTTP client that the model had."""

    def __init__(self, inner: Any, *, httpx: ModuleType, retries: int, options: Options) -> None:
        self.inner = inner
        self.options = options
        self._httpx = httpx
        self._retries = retries

    def begin(self, request: Any, *, is_async: bool) -> HttpCall | None:
        def make() -> HttpCall | None:
            suffix = engines.suffix_of(str(request.url)) if request.method == "POST" else None
            if suffix is None or "json" not in request.headers.get("content-type", ""):
                return None
            body: object = json.loads(request.content)
            if not isinstance(body, Mapping):
                return None
            return HttpCall(
                request,
                dict(cast("Mapping[str, Any]", body)),
                suffix,
                httpx=self._httpx,
                retries=self._retries,
                options=self.options,
                is_async=is_async,
            )

        try:
            return opened(make)
        except RunGone as e:
            raise RunGoneError(str(e)) from None


class _Sync(_Transport):
    def handle_request(self, request: Any) -> Any:
        call = self.begin(request, is_async=False)
        if call is None:
            return self.inner.send(request, stream=True)

        def send() -> Any:
            prepared = call.prepare(call.outgoing)
            try:
                if prepared is None:
                    response = self.inner.send(request, stream=True)
                else:
                    response = engines.sync_http(self._httpx).send(prepared, stream=True)
                content = None if call.streams(response) else b"".join(response.iter_raw())
            except self._httpx.HTTPError as e:
                if call.to_original:
                    raise  # the caller's SDK knows what to make of it, and may try again
                raise call.broken(e) from e
            return call.answer(response, content)

        try:
            return call.serve(send)
        except _Answered as e:
            return e.response

    def close(self) -> None:
        self.inner.close()


class _Async(_Transport):
    async def handle_async_request(self, request: Any) -> Any:
        call = self.begin(request, is_async=True)
        if call is None:
            return await self.inner.send(request, stream=True)

        async def send() -> Any:
            prepared = call.prepare(call.outgoing)
            try:
                if prepared is None:
                    response = await self.inner.send(request, stream=True)
                else:
                    response = await engines.async_http(self._httpx).send(prepared, stream=True)
                content = None if call.streams(response) else b"".join([part async for part in response.aiter_raw()])
            except self._httpx.HTTPError as e:
                if call.to_original:
                    raise  # the caller's SDK knows what to make of it, and may try again
                raise call.broken(e) from e
            return call.answer(response, content)

        try:
            return await call.serve_async(send)
        except _Answered as e:
            return e.response

    async def aclose(self) -> None:
        await self.inner.aclose()


@functools.cache
def _transport(module: str, *, is_async: bool) -> Any:
    """The class for this HTTP module: openai 3 speaks httpx2, older ones httpx."""
    httpx = importlib.import_module(module)
    if is_async:
        return type("MaestroAsyncTransport", (_Async, httpx.AsyncBaseTransport), {})
    return type("MaestroTransport", (_Sync, httpx.BaseTransport), {})


def through(sdk_client: Any, options: Options) -> tuple[Any, Any]:
    """Return a copy of an SDK client whose calls are managed, and the HTTP client in it; of both it shares the rest."""
    httpx = httpx_of(sdk_client)
    inner = sdk_client._client
    if inner in _ours:  # twice is once, with the options of both
        options, inner = options.over(inner._transport.options), inner._transport.inner
    is_async = isinstance(sdk_client, openai.AsyncOpenAI)
    make = httpx.AsyncClient if is_async else httpx.Client
    transport = _transport(httpx.__name__, is_async=is_async)(
        inner, httpx=httpx, retries=sdk_client.max_retries, options=options
    )
    client = make(
        transport=transport,
        headers=inner.headers,
        params=inner.params,
        cookies=inner.cookies.jar,
        timeout=inner.timeout,
        trust_env=False,  # what the environment says of proxies and keys, the inner client has heard
    )
    _ours.add(client)
    return sdk_client.with_options(http_client=client), client
