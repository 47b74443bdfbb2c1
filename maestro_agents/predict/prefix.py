"""How much of a prompt an engine already has in its prefix cache, from salted hashes of how prompts begin.

The app hashes (`prompt_blocks`), the scheduler remembers what it sent where (`PrefixCaches`). No text leaves the app: the
hashes are keyed with a salt of the pool that never leaves its queue and its apps, so they can be compared within the pool and
nowhere else. Who can read the pool's Redis can test a guess at a whole prompt, no more.

Standard library only: apps import this.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import struct
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from typing import Any, Final, cast

from maestro_agents.core import EngineSpec, Observation, Status, Ticket

BYTES_PER_TOKEN: Final = 4
CUTS: Final = tuple(accumulate(step for step in (256, 512, 1024, 2048, 4096, 8192) for _ in range(16)))
"""Where a prompt's UTF-8 bytes are hashed up to: every 64 tokens or so, and more sparsely further on, so that 96 hashes
reach 63,000 tokens. A shared beginning is known to within a tenth or so of its length, or 64 tokens."""

_DIGEST_BYTES: Final = 6
_LENGTH_BYTES: Final = 4
_IMAGE_BYTES: Final = 768 * BYTES_PER_TOKEN
"""An image stands for as many tokens as it is counted for elsewhere (a flat estimate)."""

_END: Final = "\x1e"


def prompt_blocks(body: Mapping[str, Any], salt: bytes) -> str:
    """A request's length and hashes of its beginning, up to each of `CUTS` that it reaches, as one compact word.

    The bytes are those of the prompt as chat templates order them: system messages, tools, the other messages, roles
    included. Ids of tool calls, which are new every time, are left out. "" without a salt, and for a prompt that does not
    reach the first cut. Never raises on a body of unexpected shape.
    """
    if not salt:
        return ""
    text = bytearray()
    beyond = 0
    for part in _parts(body):
        if len(text) >= CUTS[-1]:
            beyond += len(part)
        else:
            text += part.encode("utf-8", "replace") if isinstance(part, str) else part
    reached = bisect_left(CUTS, len(text) + 1)
    if not reached:
        return ""
    running = blake2b(key=salt[:64], digest_size=_DIGEST_BYTES)
    found = [min(len(text) + beyond, 2**31).to_bytes(_LENGTH_BYTES)]
    start = 0
    with memoryview(text) as view:
        for cut in CUTS[:reached]:
            running.update(view[start:cut])
            found.append(running.digest())
            start = cut
    return base64.b64encode(b"".join(found)).decode()


def conversation(body: Mapping[str, Any], salt: bytes) -> tuple[tuple[str, bytes], ...]:
    """Of each message of a request, in order: its role, and a hash of the conversation up to and with it, keyed with ``salt``.

    Where one request's conversation begins with all of another's, the last hash of that is among those of this.
    """
    source = body.get("messages")
    if source is None:
        source = body.get("input")
    if isinstance(source, str):
        source = [{"role": "user", "content": source}]
    running = blake2b(_json(body.get("instructions")).encode("utf-8", "replace"), key=salt[:64], digest_size=16)
    found: list[tuple[str, bytes]] = []
    for message in cast("list[object]", source) if isinstance(source, list) else []:
        running.update(_message(message).encode("utf-8", "replace"))
        found.append((_role(message), running.digest()))
    return tuple(found)


def _parts(body: Mapping[str, Any]) -> Iterator[str | bytes]:
    yield str(body.get("cache_salt") or "")  # vLLM shares nothing between two of these
    source = body.get("messages")
    if source is None:
        source = body.get("input")
    if isinstance(instructions := body.get("instructions"), str):
        yield f"system{_END}{instructions}{_END}"
    messages: list[object] = cast("list[object]", source) if isinstance(source, list) else []
    first = 0
    while first < len(messages) and _role(messages[first]) in ("system", "developer"):
        yield _message(messages[first])
        first += 1
    for tools in (body.get("tools"), body.get("functions")):
        if tools:
            yield _json(tools)
    if isinstance(source, str):
        yield f"user{_END}{source}{_END}"
    yield from map(_message, messages[first:])
    yield from _prompt(body.get("prompt"))


def _role(message: object) -> str:
    return str(cast("Mapping[str, Any]", message).get("role", "")) if isinstance(message, Mapping) else ""


def _message(message: object) -> str:
    if type(message) is not dict and not isinstance(message, Mapping):
        return ""
    said = cast("Mapping[str, Any]", message)
    content = said.get("content")
    if isinstance(content, list):
        content = "".join(map(_part, cast("list[object]", content)))
    text = f"{said.get('role', '')}{_END}{content if isinstance(content, str) else ''}{_END}"
    if isinstance(calls := said.get("tool_calls"), list):
        text += "".join(map(_call, cast("list[object]", calls)))
    if "type" in said:  # a call, and what it gave, in the responses API
        text += "".join(v + _END for v in map(said.get, ("name", "arguments", "output")) if isinstance(v, str))
    return text


def _call(call: object) -> str:
    return _json(cast("Mapping[str, Any]", call).get("function")) if isinstance(call, Mapping) else ""


def _part(part: object) -> str:
    """A piece of a message's content: text, a stand-in for an image, nothing of what counts for no tokens (audio, files)."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        return ""
    said = cast("Mapping[str, Any]", part)
    if isinstance(text := said.get("text"), str):
        return text
    if "image" not in str(said.get("type", "")):
        return ""
    image = said.get("image_url")
    url = str(cast("Mapping[str, Any]", image).get("url", "")) if isinstance(image, Mapping) else str(image)
    known = f"{len(url)}{url[:2048]}{url[-2048:]}".encode("utf-8", "replace")  # it may be megabytes of data
    return blake2b(known, digest_size=16).hexdigest() * (_IMAGE_BYTES // 32)


def _prompt(prompt: object) -> Iterator[str | bytes]:
    """A completion's prompt: text, token ids (four bytes each, as a token counts), or a list of either."""
    if isinstance(prompt, str):
        yield prompt
    elif isinstance(prompt, list) and prompt:
        items = cast("list[object]", prompt)
        if type(items[0]) is int:
            try:
                yield struct.pack(f">{len(items)}I", *items)
            except struct.error:
                yield _json(items)
        else:
            for item in items:
                yield from _prompt(item)


def _json(value: object) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):
        return ""


# -- the scheduler's side ----------------------------------------------------------------------------------------------
UNKNOWN_KV_TOKENS: Final = 100_000
"""Tokens that an engine is believed to remember where its KV memory is unknown."""

MAX_BLOCKS: Final = 50_000
"""Hashes remembered of an engine, whatever its memory."""

WINDOW: Final = 200
"""Completions over which an engine's error is measured."""

TRUST_TOKENS: Final = 1_000.0
"""Expected tokens that the first guess (all of them are hits) is worth against what an engine reports."""

FORGET: Final = 0.98
MAX_PENDING: Final = 20_000

_TOKENS: Final = tuple((b - a) / BYTES_PER_TOKEN for a, b in zip((0, *CUTS), CUTS, strict=False))


@functools.lru_cache(maxsize=4096)
def _read(prefix: str) -> tuple[int, tuple[bytes, ...]]:
    """The length in bytes and the hashes of a prompt; nothing of what no client of ours wrote."""
    try:
        raw = base64.b64decode(prefix, validate=True)
    except (binascii.Error, ValueError):
        return 0, ()
    hashes = tuple(raw[i : i + _DIGEST_BYTES] for i in range(_LENGTH_BYTES, len(raw), _DIGEST_BYTES))[: len(CUTS)]
    size = int.from_bytes(raw[:_LENGTH_BYTES])
    return (size, hashes) if hashes and size >= CUTS[len(hashes) - 1] else (0, ())


@dataclass(slots=True)
class _Cache:
    """One engine's. The beginning of a prompt is always younger than what follows it, so it is forgotten later."""

    #: Hash -> its place in `CUTS`; the oldest first.
    blocks: OrderedDict[bytes, int] = field(default_factory=OrderedDict[bytes, int])
    tokens: float = 0.0
    #: Tokens that were known to be there, and how many were hits, older ones fading.
    expected: float = TRUST_TOKENS
    reported: float = TRUST_TOKENS
    errors: deque[int] = field(default_factory=lambda: deque[int](maxlen=WINDOW))
    cached: deque[int] = field(default_factory=lambda: deque[int](maxlen=WINDOW))
    completions: int = 0

    def known(self, prefix: str) -> float:
        """The share of a prompt that its longest remembered beginning makes up."""
        size, hashes = _read(prefix)
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in self.blocks:
                low = middle
            else:
                high = middle - 1
        return CUTS[low - 1] / size if low else 0.0

    def hits(self, known: float, prompt_tokens: int, block_tokens: int) -> int:
        """Tokens to expect: whole blocks, and never the whole prompt, since its last token is always computed."""
        tokens = min(known * self.reported / self.expected * prompt_tokens, max(0, prompt_tokens - 1))
        return int(tokens) // block_tokens * block_tokens

    def remember(self, prefix: str, capacity_tokens: float) -> None:
        _, hashes = _read(prefix)
        for place in range(len(hashes) - 1, -1, -1):
            if hashes[place] not in self.blocks:
                self.tokens += _TOKENS[place]
                self.blocks[hashes[place]] = place
            self.blocks.move_to_end(hashes[place])
        while self.blocks and (self.tokens > capacity_tokens or len(self.blocks) > MAX_BLOCKS):
            self.tokens -= _TOKENS[self.blocks.popitem(last=False)[1]]


class PrefixCaches:
    """What each engine has in its prefix cache, as far as it was sent there by Maestro.

    An expectation: the share of the prompt that its longest known beginning makes up x its tokens x how many of such tokens
    that engine has reported as hits before (none where it caches nothing, or says nothing), in whole blocks. Answers are not
    known here, though an engine caches them too.
    """

    def __init__(self) -> None:
        self._engines: dict[str, _Cache] = {}
        #: Stage -> where it was sent, and the share of its prompt that was known there.
        self._pending: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def expected_hit_tokens(self, ticket: Ticket, spec: EngineSpec) -> int:
        """Prompt tokens of a stage that an engine need not compute."""
        cache = self._engines.get(spec.engine_id)
        if cache is None or not ticket.prefix:
            return 0
        return cache.hits(cache.known(ticket.prefix), ticket.prompt_tokens, spec.kv_block_tokens)

    def granted(self, ticket: Ticket, spec: EngineSpec) -> None:
        """A stage is on its way to an engine, which will have its prompt."""
        if not ticket.prefix:
            return
        cache = self._engines.setdefault(spec.engine_id, _Cache())
        self._pending[ticket.stage_id] = (spec.engine_id, cache.known(ticket.prefix))
        if len(self._pending) > MAX_PENDING:
            self._pending.popitem(last=False)
        cache.remember(ticket.prefix, _capacity_tokens(spec))

    def observe(self, o: Observation, spec: EngineSpec) -> None:
        """A stage has ended on an engine: compare, and learn. One that no planner saw is judged by what is known now.

        Compared by the engine's own count of the prompt's tokens: how far the estimate of that is off is no error of this.
        """
        sent_to, known = self._pending.pop(o.stage_id, ("", 0.0))
        if o.status is not Status.DONE or o.observed or not o.prefix:
            return
        cache = self._engines.setdefault(spec.engine_id, _Cache())
        if sent_to != spec.engine_id:
            known = cache.known(o.prefix)
        cache.remember(o.prefix, _capacity_tokens(spec))
        if o.output_estimated:  # an answer without usage says nothing of hits
            return
        cache.completions += 1
        cache.errors.append(abs(cache.hits(known, o.prompt_tokens, spec.kv_block_tokens) - o.cached_tokens))
        cache.cached.append(o.cached_tokens)
        if tokens := known * o.prompt_tokens:
            cache.expected = FORGET * cache.expected + tokens
            cache.reported = FORGET * cache.reported + min(o.cached_tokens, 2 * tokens)

    def forget(self, engine_id: str) -> None:
        """An engine has lost its KV memory."""
        if (cache := self._engines.get(engine_id)) is not None:
            cache.blocks.clear()
            cache.tokens = 0.0

    def status(self) -> dict[str, dict[str, float]]:
        """By engine: completions compared, the mean of |expected - reported| over the last `WINDOW` of them, the mean that
        was reported, the share of known tokens that were hits, and the tokens remembered.
        """
        return {
            engine_id: {
                "completions": c.completions,
                "mean_error_tokens": sum(c.errors) / len(c.errors) if c.errors else 0.0,
                "mean_cached_tokens": sum(c.cached) / len(c.cached) if c.cached else 0.0,
                "hit_ratio": c.reported / c.expected,
                "known_tokens": c.tokens,
            }
            for engine_id, c in self._engines.items()
        }


def _capacity_tokens(spec: EngineSpec) -> float:
    return spec.kv_bytes / max(1, spec.kv_bytes_per_token) if spec.kv_bytes else UNKNOWN_KV_TOKENS
