"""A bug of ours never breaks the user's graph: it is told once and the call goes on."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

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


@contextmanager
def quietly(where: str) -> Generator[None]:
    """Keep an error of ours from the user's call."""
    try:
        yield
    except Exception as e:  # a bug of ours never breaks the user's graph
        warn_once(where, e)
