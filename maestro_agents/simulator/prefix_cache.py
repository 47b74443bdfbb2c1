"""Which prompts' beginnings an engine still has in its KV blocks: vLLM's prefix caching, by named texts. No clock, no I/O.

A prompt names how it begins: ``(("system:coder", 900), ("run-7", 5_200))`` says that its tokens up to the 900th are the
text ``system:coder``'s, and those from there up to the 5,200th ``run-7``'s. Another prompt shares what comes before the
first name (or number of tokens before it) that differs. A text may grow: ``("run-7", 8_000)`` goes on where
``("run-7", 5_200)`` ended, as a conversation does. A number beyond the prompt's end names the answer.

As in vLLM's ``KVCacheManager`` and ``BlockPool``: only full blocks are shared; a block can be hit from the step on that
computes it; what no running request uses any more is kept until its block is needed for something else, the least
recently used first, of one prompt the end first. Unlike there, an answer can be hit only once its request gave up its
blocks, and two running requests that share a prefix are charged for it twice (so less fits than in vLLM).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

Prefix = tuple[tuple[str, int], ...]
"""(name of a text, tokens of the prompt up to its end), in order."""


@dataclass(kw_only=True, slots=True, eq=False)
class _Text:
    """The blocks ``first <= n < last`` of every prompt that has this text there."""

    first: int
    last: int
    #: For each running request that uses it, up to which block.
    held: list[int] = field(default_factory=list[int])
    #: Blocks at its end that no running request uses.
    idle: int = 0


class PrefixCache:
    """Counts blocks; whose they are is the engine's business. `blocks` must be kept within those free by `shrink`."""

    def __init__(self, block_size: int) -> None:
        #: Blocks that hold a text and that no running request uses.
        self.blocks = 0
        self._size = block_size
        #: By name and first token.
        self._texts: dict[tuple[str, int], _Text] = {}
        #: Those with idle blocks, the least recently used first.
        self._idle: OrderedDict[tuple[str, int], _Text] = OrderedDict()

    def hit(self, prefix: Prefix, limit: int) -> int:
        """How many of the first ``limit`` tokens are there: whole blocks."""
        blocks = start = 0
        for name, end in prefix:
            last = min(end, limit) // self._size
            if last > blocks:
                text = self._texts.get((name, start))
                if text is None:
                    break
                blocks = min(last, text.last)
                if blocks < last:
                    break
            if end >= limit:
                break
            start = end
        return blocks * self._size

    def hold(self, prefix: Prefix, was: int, to: int) -> None:
        """A running request that held its first ``was`` tokens holds those up to ``to``: they can be hit."""
        for key, first, before, last in self._parts(prefix, was, to):
            if last > before:
                text = self._texts.get(key)
                if text is None:
                    text = self._texts[key] = _Text(first=first, last=last)
                if before > first:
                    text.held.remove(before)
                text.held.append(last)
                text.last = max(text.last, last)
                self._count(key, text)

    def release(self, prefix: Prefix, was: int, to: int) -> None:
        """A request that held its first ``was`` tokens, and computed ``to``, gives its blocks up: they can still be hit."""
        for key, first, before, last in reversed(list(self._parts(prefix, was, to))):
            text = self._texts.get(key)
            if text is None:
                text = self._texts[key] = _Text(first=first, last=last)
            if before > first:
                text.held.remove(before)
            text.last = max(text.last, last)
            self._count(key, text)
            if text.idle:
                self._idle.move_to_end(key)

    def shrink(self, blocks: int) -> None:
        """Forget what was not used for longest until no more than so many blocks are filled with what nobody uses."""
        while self.blocks > blocks:
            key, text = next(iter(self._idle.items()))
            cut = min(text.idle, self.blocks - blocks)
            text.last -= cut
            text.idle -= cut
            self.blocks -= cut
            if not text.idle:
                del self._idle[key]
                if not text.held:
                    del self._texts[key]

    def _parts(self, prefix: Prefix, was: int, to: int) -> Iterator[tuple[tuple[str, int], int, int, int]]:
        """Each text with full blocks among the first ``to`` tokens: key, first block, ends at ``was`` and at ``to``."""
        size, start = self._size, 0
        for name, end in prefix:
            first, last = start // size, min(end, to) // size
            if last > first:
                yield (name, start), first, min(end, was) // size, last
            if end >= to:
                break
            start = end

    def _count(self, key: tuple[str, int], text: _Text) -> None:
        idle = text.last - max(text.held, default=text.first)
        self.blocks += idle - text.idle
        text.idle = idle
        if idle:
            self._idle[key] = text  # an old one keeps its place
        else:
            self._idle.pop(key, None)
