"""What an answer says of its own cost, read on its way to the caller: first byte, usage, end. Bytes pass through as they come.

One thing is taken out: the usage chunk that Maestro asked the engine for and the caller did not. A partial event is held
until it is whole, which costs nothing: the SDK cannot use half an event either. vLLM signs the last chunk (its
``system_fingerprint``), so the one before the usage is held until then, and signed as it would have been without.
"""

from __future__ import annotations

import contextlib
import json
import re
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self, cast

_CONTENT: Final = re.compile(
    rb'"(?:content|text|reasoning(?:_content)?|arguments|delta)"\s*:\s*"((?!")[^"\\]*+(?:\\.[^"\\]*+)*+)"', re.DOTALL
)
"""A piece of the answer in an event, whichever of the SDK's ways it was asked for in: about one token of it."""

_TOKEN_BYTES: Final = 5
"""A little more than a token of prose has: pieces count where each is a token. A loaded vLLM tells several in one."""

_FINISH: Final = re.compile(rb'"finish_reason"\s*:\s*"')
_SIGNATURE: Final = re.compile(rb'"system_fingerprint"\s*:\s*"[^"]*"')
_EVENT_END: Final = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_TELLING: Final = (b'"usage"', b'"tool_calls"', b'"error"', b"response.created", b"response.completed", b"response.failed",
                   b"response.incomplete")  # fmt: skip
_LONGEST_EVENT_BYTES: Final = 4 << 20
_LONGEST_BODY_BYTES: Final = 4 << 20


@dataclass(slots=True, kw_only=True)
class Usage:
    """What an answer says of its own cost; zeros where it says nothing."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    #: Events of a stream that held a piece of the answer: an estimate of ``output_tokens`` where no usage is told.
    content_events: int = 0
    #: Bytes of these pieces.
    content_bytes: int = 0
    cached_tokens: int = 0
    tool_calls: int = 0
    engine_queue_s: float = 0.0
    engine_ttft_s: float = 0.0
    response_id: str = ""
    failed: bool = False

    @property
    def passed_tokens(self) -> int:
        """About the output tokens so far: by pieces, or by bytes where pieces hold several."""
        return max(self.content_events, self.content_bytes // _TOKEN_BYTES)

    def absorb(self, body: Mapping[str, Any]) -> None:
        """Take what a whole answer, a chunk, or an event of the responses API says. Anything else is ignored."""
        inner = body.get("response")
        if isinstance(inner, Mapping):
            self.failed |= body.get("type") == "response.failed"
            body = cast("Mapping[str, Any]", inner)
        self.failed |= bool(body.get("error"))
        if body.get("object") == "response":
            self.response_id = str(body.get("id") or self.response_id)
        usage = _mapping(body.get("usage"))
        if usage:
            self.prompt_tokens = _int(usage.get("prompt_tokens", usage.get("input_tokens")))
            self.output_tokens = _int(usage.get("completion_tokens", usage.get("output_tokens")))
            details = _mapping(usage.get("prompt_tokens_details") or usage.get("input_tokens_details"))
            self.cached_tokens = _int(details.get("cached_tokens"))
        metrics = _mapping(body.get("metrics"))  # vLLM --enable-per-request-metrics
        if metrics:
            self.engine_queue_s = _float(metrics.get("queue_time_ms")) / 1000
            self.engine_ttft_s = _float(metrics.get("time_to_first_token_ms")) / 1000
        for choice in _mappings(body.get("choices")):
            whole = _mapping(choice.get("message"))
            self.tool_calls += len(_mappings(whole.get("tool_calls")))
            # a streamed call is named once, in its first piece
            pieces = _mappings(_mapping(choice.get("delta")).get("tool_calls"))
            self.tool_calls += sum(1 for p in pieces if p.get("id"))
        outputs = [o for o in _mappings(body.get("output")) if o.get("type") == "function_call"]
        self.tool_calls = max(self.tool_calls, len(outputs))


class Watched(Protocol):
    """The call that an answer belongs to. None of these waits or raises; the first end counts."""

    def first_byte(self) -> None: ...
    def grew(self, output_tokens: int) -> None: ...
    def finish(self, usage: Usage, *, ok: bool) -> None: ...
    def cancel(self) -> None: ...


class Watcher:
    """Reads along: fed with bytes, returns the bytes for the caller, tells the call what happened."""

    def __init__(self, call: Watched, *, events: bool, hide_usage: bool, legible: bool) -> None:
        self._call = call
        self._events = events
        self._hide_usage = hide_usage and events and legible
        self._legible = legible
        self._buffer = bytearray()
        self._last = b""
        self._handed = False
        self._complete = False
        self._ended = False
        self.usage = Usage()

    def feed(self, chunk: bytes) -> bytes:
        """Return what of it (and of what was held back) goes to the caller now."""
        if not self._legible:
            return chunk
        try:
            return self._read(chunk)
        except Exception:  # a bug of ours: from here on the bytes just pass
            held, self._legible = self._last + bytes(self._buffer), False
            self._last = b""
            self._buffer.clear()
            return (held if self._hide_usage else b"") or chunk

    def _read(self, chunk: bytes) -> bytes:
        self._buffer += chunk
        if not self._events:
            if len(self._buffer) > _LONGEST_BODY_BYTES:
                self._legible = False
                self._buffer.clear()
            return chunk
        kept = bytearray()
        while end := _EVENT_END.search(self._buffer):
            event = bytes(self._buffer[: end.end()])
            del self._buffer[: end.end()]
            if self._look(event):
                self._last = _signed(self._last, event)
                continue
            kept += self._last
            self._last = event if self._hide_usage and _FINISH.search(event) else b""
            kept += b"" if self._last else event
        self._call.grew(self.usage.passed_tokens)
        if len(self._buffer) > _LONGEST_EVENT_BYTES:
            kept += self._last + self._buffer
            self._last = b""
            self._buffer.clear()
            self._legible = False
        return bytes(kept) if self._hide_usage else chunk

    def _look(self, event: bytes) -> bool:
        """Learn from an event; True where it is the usage chunk that nobody but us asked for."""
        if event.startswith((b"data: [DONE]", b"data:[DONE]")):
            self._complete = True
            return False
        if piece := _CONTENT.search(event):
            self.usage.content_events += 1
            self.usage.content_bytes += piece.end(1) - piece.start(1)
        if not any(word in event for word in _TELLING):
            return False
        data = b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
        try:
            body = json.loads(data)
        except ValueError:
            return False
        fields = _mapping(body)
        self.usage.absorb(fields)
        if fields.get("type") in {"response.completed", "response.incomplete", "response.failed"}:
            self._complete = True
        return self._hide_usage and fields.get("choices") == [] and bool(fields.get("usage"))

    def rest(self) -> bytes:
        """Return what was held back at the end of the answer."""
        held = self._last + bytes(self._buffer) if self._hide_usage else b""
        if not self._events and self._legible and self._buffer:
            with contextlib.suppress(Exception):  # no JSON, or a bug of ours: it says nothing of its cost then
                self.usage.absorb(_mapping(json.loads(bytes(self._buffer))))
        self._buffer.clear()
        return held

    def handed(self) -> None:
        """Note that bytes reach the caller now."""
        if not self._handed:
            self._handed = True
            self._call.first_byte()
        if self._complete:  # the engine is free, whether or not the caller reads on
            self.end(ok=not self.usage.failed)

    def mute(self) -> None:
        """Say nothing any more: the call goes on with another answer."""
        self._ended = True

    def end(self, *, ok: bool) -> None:
        if not self._ended:
            self._ended = True
            self._call.finish(self.usage, ok=ok)

    def abandon(self) -> None:
        """The caller stopped reading, or lost the answer altogether."""
        # of a compressed answer we cannot tell the end, and the SDK closes it there
        if self._complete or (self._handed and not self._legible):
            self.end(ok=not self.usage.failed)
        elif not self._ended:
            self._ended = True
            self._call.cancel()

    def broke(self, error: BaseException) -> None:
        if isinstance(error, Exception):
            self.end(ok=False)
        else:
            self.abandon()


class SyncTap:
    """A byte stream of httpx, watched."""

    def __init__(self, inner: Any, watcher: Watcher) -> None:
        self._inner, self._watcher, self._head = inner, watcher, b""
        self._source: Iterator[bytes] = iter(inner)
        self._over = False
        weakref.finalize(self, watcher.abandon).atexit = False

    def prime(self) -> None:
        """Wait for the first bytes. An error here came before the first byte: the answer is dropped, nothing is noted."""
        try:
            self._head = self._pull()
        except BaseException:
            self._watcher.mute()
            with contextlib.suppress(Exception):
                self._inner.close()
            raise

    def _pull(self) -> bytes:
        while not self._over:
            chunk = next(self._source, None)
            if chunk is None:
                self._over = True
                return self._watcher.rest()
            if out := self._watcher.feed(chunk):
                return out
        return b""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        try:
            out, self._head = self._head or self._pull(), b""
        except BaseException as e:
            self._watcher.broke(e)
            raise
        if not out:
            self._watcher.end(ok=not self._watcher.usage.failed)
            raise StopIteration
        self._watcher.handed()
        return out

    def close(self) -> None:
        try:
            self._inner.close()
        finally:
            self._watcher.abandon()


class AsyncTap:
    """The same on an event loop."""

    def __init__(self, inner: Any, watcher: Watcher) -> None:
        self._inner, self._watcher, self._head = inner, watcher, b""
        self._source: AsyncIterator[bytes] = aiter(inner)
        self._over = False
        weakref.finalize(self, watcher.abandon).atexit = False

    async def prime(self) -> None:
        try:
            self._head = await self._pull()
        except BaseException:
            self._watcher.mute()
            with contextlib.suppress(Exception):
                await self._inner.aclose()
            raise

    async def _pull(self) -> bytes:
        while not self._over:
            chunk = await anext(self._source, None)
            if chunk is None:
                self._over = True
                return self._watcher.rest()
            if out := self._watcher.feed(chunk):
                return out
        return b""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            out, self._head = self._head or await self._pull(), b""
        except BaseException as e:
            self._watcher.broke(e)
            raise
        if not out:
            self._watcher.end(ok=not self._watcher.usage.failed)
            raise StopAsyncIteration
        self._watcher.handed()
        return out

    async def aclose(self) -> None:
        try:
            await self._inner.aclose()
        finally:
            self._watcher.abandon()


def _signed(event: bytes, usage: bytes) -> bytes:
    """The last event of an answer, with the signature of the usage that followed it."""
    signature = _SIGNATURE.search(usage)
    end = event.rfind(b"}")
    return event[:end] + b"," + signature[0] + event[end:] if signature and end > 0 else event


def _mapping(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if type(value) is dict or isinstance(value, Mapping) else {}


def _mappings(value: object) -> Sequence[Mapping[str, Any]]:
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [m for i in items if (m := _mapping(i))]


def _int(value: object) -> int:
    return max(0, int(value)) if isinstance(value, int | float) else 0


def _float(value: object) -> float:
    return max(0.0, float(value)) if isinstance(value, int | float) else 0.0
