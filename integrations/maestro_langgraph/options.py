"""What the code can say about a workflow's runs, checked where it is said."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Self, TypedDict, cast
from uuid import UUID

from maestro_agents.core import ServiceClass
from maestro_agents.errors import ConfigError


class OptionArgs(TypedDict, total=False):
    """What can be said to ``@maestro(...)``, ``maestro.wrap``, ``install``, ``options``, ``wrap_model`` and the middleware."""

    #: Who waits for the answer: ``interactive`` or ``batch``.
    service_class: ServiceClass | str
    #: Seconds from a run's start within which it should end.
    deadline_s: float
    #: Whose work it is.
    tenant: str
    #: What to call the agent, where the graph has no telling name.
    agent: str
    #: Refuse early, rather than serve late, when the deadline cannot be met.
    refuse_late: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options after checking; None where nothing was said."""

    service_class: ServiceClass | None = None
    deadline_s: float | None = None
    tenant: str | None = None
    agent: str | None = None
    refuse_late: bool | None = None

    @classmethod
    def check(cls, given: OptionArgs | dict[str, Any]) -> Self:
        """Build from keyword arguments. Raises `ConfigError` that says what to do."""
        known = [f.name for f in dataclasses.fields(cls)]
        values: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
                raise ConfigError(f"maestro has no option {name!r}: {hint}")
        if "service_class" in values:
            try:
                values["service_class"] = ServiceClass(values["service_class"])
            except ValueError:
                classes = " or ".join(f'"{c.value}"' for c in ServiceClass)
                raise ConfigError(f"service_class = {values['service_class']!r}: say {classes}") from None
        if "deadline_s" in values:
            deadline_s = values["deadline_s"]
            number = isinstance(deadline_s, int | float) and not isinstance(deadline_s, bool)
            if not number or not 0 < cast("float", deadline_s) < math.inf:
                raise ConfigError(f"deadline_s = {deadline_s!r}: give the seconds a run may take, more than 0")
        for name in ("tenant", "agent"):
            if name in values and (not isinstance(values[name], str) or not values[name].strip()):
                raise ConfigError(f"{name} = {values[name]!r}: give a name, or leave it out")
        if not isinstance(values.get("refuse_late", False), bool):
            raise ConfigError(f"refuse_late = {values['refuse_late']!r}: say True or False")
        return cls(**values)

    def over(self, other: Options) -> Options:
        """Return these options, and the other's where nothing is said here."""
        if self == _NOTHING:
            return other
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(other, **{k: v for k, v in mine.items() if v is not None})


_NOTHING: Final = Options()
_request_options: ContextVar[Options] = ContextVar("maestro_options", default=_NOTHING)


@contextmanager
def request_options(options: Options) -> Generator[None]:
    """Hold options for every run that begins inside."""
    token = _request_options.set(options.over(_request_options.get()))
    try:
        yield
    finally:
        _request_options.reset(token)


model_options: Final[ContextVar[tuple[UUID, Options] | None]] = ContextVar("maestro_model_options", default=None)
"""What was said of the model that is being called here, with the callback id of that call."""


def said_of_model(llm_run: UUID | None) -> Options | None:
    """Return what was said of the model of this call; None where nobody gave the model to Maestro."""
    said = model_options.get()
    return said[1] if said is not None and said[0] == llm_run else None


_defaults = _NOTHING


def set_defaults(options: Options) -> None:
    """Hold the options of `maestro.install`, for where neither the graph nor the request says otherwise."""
    global _defaults
    _defaults = options


def options_now(graph: Options = _NOTHING) -> Options:
    """Return what holds for a run that begins now: the request's word over the graph's over the process's."""
    return _request_options.get().over(graph).over(_defaults)
