"""A bug of ours never breaks the user's graph: it is told once and the call goes on."""

from __future__ import annotations

import logging
from types import TracebackType

logger = logging.getLogger("maestro")

_warned: set[str] = set()


def warn_once(where: str, error: BaseException) -> None:
    """Say once per place that something of ours failed; the user's call goes on."""
    if where not in _warned and len(_warned) < 100:
        _warned.add(where)
        logger.warning("maestro: %s failed (%s: %s); your calls go on", where, type(error).__name__, error)
        logger.debug("maestro: %s failed", where, exc_info=error)


def tell_once(text: str) -> None:
    """Say something that the user should know, once."""
    if text not in _warned and len(_warned) < 100:
        _warned.add(text)
        logger.warning("maestro: %s", text)


class quietly:  # noqa: N801 - used as a function
    """Keep an error of ours from the user's call: ``with quietly("what is done"): ...``."""

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _at: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        warn_once(self._where, error)
        return True
