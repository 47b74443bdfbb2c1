"""A bug of ours never breaks the user's graph: it is told once and the call goes on."""

from __future__ import annotations

import logging
import os
import traceback
from types import TracebackType
from typing import Final

from maestro_agents.errors import MaestroError

logger = logging.getLogger("maestro")

_warned: set[str] = set()

_OF_NO_CALL: Final = (MaestroError, OSError, ImportError, AttributeError)
"""Errors whose words are ours, or the system's. Those of others name the value that they did not like, which may be a prompt."""


def warn_once(where: str, error: BaseException) -> None:
    """Say once per place that something of ours failed; the user's call goes on. Nothing of the call is logged."""
    if where not in _warned and len(_warned) < 100:
        _warned.add(where)
        logger.warning("maestro: %s failed (%s); your calls go on", where, _told(error))
        logger.debug("maestro: %s failed at\n%s", where, "".join(traceback.format_tb(error.__traceback__)))


def _told(error: BaseException) -> str:
    name = type(error).__name__
    if isinstance(error, _OF_NO_CALL):
        return f"{name}: {error}"
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{name} at {os.path.basename(last[0].filename)}:{last[0].lineno}" if last else name


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
