"""A user's own policy for `maestro simulate --policy FILE.py:order`: a function, or a whole `Policy`."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, cast

from maestro_agents.cli.graph import _import_file, _import_module, _line_of, _split, _told
from maestro_agents.core import Prediction, Ticket
from maestro_agents.errors import ConfigError
from maestro_agents.policy import Order, Policy

_HELP = "a function of (ticket, prediction, now_s) that returns a moment in seconds, smaller first, or a Policy"


@functools.cache
def own_policy(target: str) -> Policy:
    """Import ``FILE.py:name`` (or ``package.module:name``). Raises `ConfigError`, one line, for whatever is wrong with it."""
    place, name = _split(target)
    if not name:
        raise ConfigError(f"--policy {target}: which of its functions? Name one, `{target}:order`")
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise ConfigError(f"--policy {target}: there is no file {place}")
    with _told(target):
        module = _import_file(path) if path.is_file() else _import_module(place)
    found = getattr(module, name, None)
    if isinstance(found, Policy):
        return dataclasses.replace(found, order=_checked(target, found.order))
    if not callable(found) or isinstance(found, type):
        what = "has no" if found is None else "has no function"
        raise ConfigError(f"--policy {target}: {place} {what} {name!r}. It is {_HELP}")
    return Policy(order=_checked(target, cast("Order", found)))


def _checked(target: str, order: Order) -> Order:
    """The same order, whose errors are told as the user's own."""

    @functools.wraps(order)
    def checked(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
        try:
            moment: Any = order(ticket, prediction, now_s)
        except Exception as e:
            raise ConfigError(
                f"--policy {target} failed{_line_of(e)} with {type(e).__name__}: {e}. It is {_HELP}"
            ) from e
        if not isinstance(moment, int | float) or math.isnan(moment):
            raise ConfigError(f"--policy {target} returned {moment!r} for a stage of {ticket.role}. It is {_HELP}")
        return moment

    return checked
