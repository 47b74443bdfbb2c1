"""Our own OpenAI clients, one per engine: nothing of the caller's client travels to an engine.

A caller's client carries a key, organisation headers, default headers and queries, cookies, proxies and auth hooks, all
meant for the provider it was made for. An engine gets the body, the allowed headers, and the key that the environment
holds for it, or the token that the scheduler published for the proxy in front of it. Clients live in one process (a fork starts
without) and, where asynchronous, on one event loop.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import openai
from openai._compat import model_copy
from openai._models import FinalRequestOptions

from maestro_agents.core import EngineSpec
from maestro_agents.hints import Sent

PATHS: Final = ("/chat/completions", "/completions", "/responses")
"""What Maestro manages, below the URL of an engine or a provider."""
MAX_CLIENTS: Final = 256
NO_KEY: Final = "EMPTY"
_HEADERS: Final = frozenset({"accept", "content-type"})
_HEADER_PREFIXES: Final = (
    "x-stainless-",
    "____stainless",
)  # the SDK's own switches; the latter never leave the process

_Key = tuple[str, str]
_Client = TypeVar("_Client", openai.OpenAI, openai.AsyncOpenAI)
_K = TypeVar("_K")
_V = TypeVar("_V")
_sync: dict[_Key, openai.OpenAI] = {}
_async: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Key, openai.AsyncOpenAI]] = WeakKeyDictionary()

_http: dict[str, Any] = {}
_async_http: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Any]] = WeakKeyDictionary()


def _clear() -> None:
    # the parent's sockets are the parent's: forget them without closing
    _sync.clear()
    _async.clear()
    _http.clear()
    _async_http.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_clear)


def sync_client(engine: EngineSpec) -> openai.OpenAI:
    """Return this process's client for an engine."""
    key = _key(engine)
    client = _sync.get(key)
    if client is None:
        _bound(_sync)
        client = _sync[key] = _strip(openai.OpenAI(base_url=engine.url, api_key=key[1], max_retries=0))
    return client


def async_client(engine: EngineSpec) -> openai.AsyncOpenAI:
    """Return the running loop's client for an engine."""
    clients = _on_this_loop(_async)
    key = _key(engine)
    client = clients.get(key)
    if client is None:
        _bound(clients)
        client = clients[key] = _strip(openai.AsyncOpenAI(base_url=engine.url, api_key=key[1], max_retries=0))
    return client


def _on_this_loop(table: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_K, _V]]) -> dict[_K, _V]:
    loop = asyncio.get_running_loop()
    if loop not in table:
        for ended in [known for known in tuple(table) if known.is_closed()]:
            table.pop(ended, None)  # pooled sockets would keep a closed loop alive
        table[loop] = {}
    return table[loop]


def _key(engine: EngineSpec) -> _Key:
    return engine.url, (os.environ.get(engine.api_key_env) if engine.api_key_env else None) or NO_KEY


def _bound(clients: dict[_Key, Any]) -> None:
    while len(clients) >= MAX_CLIENTS:
        clients.pop(next(iter(clients)))


def _strip(client: _Client) -> _Client:
    """Take back what the SDK reads from the environment by itself (OPENAI_ORG_ID, OPENAI_CUSTOM_HEADERS and others)."""
    inner = cast("Any", client)
    for name in ("organization", "project", "admin_api_key", "webhook_secret"):
        if hasattr(inner, name):
            setattr(inner, name, None)
    # events are read along as they pass, so they must come uncompressed
    inner._custom_headers = {"Accept-Encoding": "identity"}
    return client


def sync_http(httpx: ModuleType) -> Any:
    """Return this process's bare HTTP client for all engines, of the module that the caller's client is built on."""
    client = _http.get(httpx.__name__)
    if client is None:
        client = _http[httpx.__name__] = httpx.Client(limits=_limits(httpx), follow_redirects=True)
    return client


def async_http(httpx: ModuleType) -> Any:
    """Return the running loop's."""
    clients = _on_this_loop(_async_http)
    client = clients.get(httpx.__name__)
    if client is None:
        client = clients[httpx.__name__] = httpx.AsyncClient(limits=_limits(httpx), follow_redirects=True)
    return client


def _limits(httpx: ModuleType) -> Any:
    return httpx.Limits(max_connections=1000, max_keepalive_connections=100)  # as the SDK's own


@functools.lru_cache(maxsize=256)
def suffix_of(url: str) -> str | None:
    """The path below an engine's URL, where Maestro manages it."""
    path = urlsplit(url).path.rstrip("/")
    return next((known for known in PATHS if f"/{path.lstrip('/')}".endswith(known)), None)


def headers_for(engine: EngineSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """The headers of a bare HTTP request to an engine."""
    # events are read along as they pass, so they must come uncompressed
    key = engine.token or _key(engine)[1]
    return {**_allowed(given), "Authorization": f"Bearer {key}", "Accept-Encoding": "identity"}


def outgoing(options: FinalRequestOptions, *, engine: EngineSpec, suffix: str, timeout: Any, added: Sent) -> Any:
    """Return the request as an engine gets it; the caller's own options are not touched."""
    sent = model_copy(options)
    sent.url = suffix
    sent.params = {}
    sent.max_retries = 0
    sent.timeout = timeout
    sent.idempotency_key = None
    given: Mapping[str, Any] = cast("Any", options.headers) if isinstance(options.headers, Mapping) else {}
    sent.headers = {**_allowed(given), **added.headers}
    if engine.token:  # of this call, not of the client: it changes every few seconds, and connections are kept
        sent.headers["Authorization"] = f"Bearer {engine.token}"
    sent.extra_json = {**cast("Mapping[str, Any]", options.extra_json or {}), **added.body}
    return sent


def _allowed(headers: Mapping[str, Any]) -> dict[str, Any]:
    """What of the caller's headers travels to an engine."""
    return {k: v for k, v in headers.items() if k.lower() in _HEADERS or k.lower().startswith(_HEADER_PREFIXES)}
