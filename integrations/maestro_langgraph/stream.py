"""Finding the HTTP response behind what the SDK returned, and putting a watcher between its bytes and their reader."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from maestro_agents.usage import AsyncTap, SyncTap, Watched, Watcher


def unread_response(result: object) -> Any | None:
    """Return the HTTP response behind what the SDK returned, where its body is still to be read; else None."""
    response = http_response(result)
    return None if response is None or response.is_closed or response.is_stream_consumed else response


def http_response(result: object) -> Any | None:
    """Return the HTTP response behind what the SDK returned: a stream, a raw response, or the response itself."""
    for candidate in (result, getattr(result, "http_response", None), getattr(result, "response", None)):
        if hasattr(candidate, "is_stream_consumed"):
            return candidate
    return None


def tap(response: Any, call: Watched, *, hide_usage: bool, is_async: bool) -> Any:
    """Put a watcher between a response's bytes and whoever reads them."""
    kind = str(response.headers.get("content-type", ""))
    plain = str(response.headers.get("content-encoding", "identity")) in {"", "identity"}
    watcher = Watcher(call, events="event-stream" in kind, hide_usage=hide_usage, legible=plain)
    # openai 3 speaks httpx2, older ones httpx: the response knows which
    make = _tap_class(type(response).__module__.split(".")[0], is_async)
    response.stream = make(response.stream, watcher)
    return response.stream


@functools.cache
def _tap_class(module: str, is_async: bool) -> Callable[[Any, Watcher], Any]:  # noqa: FBT001 - a cache key
    httpx = importlib.import_module(module)
    if is_async:
        return type("MaestroAsyncTap", (AsyncTap, httpx.AsyncByteStream), {})
    return type("MaestroSyncTap", (SyncTap, httpx.SyncByteStream), {})
