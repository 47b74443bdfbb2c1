"""Maestro's refusals in the SDK's own classes, so that handlers written for either know them.

Through LangChain a refusal becomes LangChain's class of the same kind; ours is then its ``__cause__``.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, cast

import openai

from maestro_agents.errors import (
    MaestroError,
    NoEngineFits,
    QueueFull,
    QueueUnavailable,
    QuotaExceeded,
    RunGone,
    StageRefused,
    WaitTooLong,
)


class QueueFullError(QueueFull, openai.RateLimitError):
    """The queue for this model is full (status 429, ``retry-after``)."""


class QuotaExceededError(QuotaExceeded, openai.RateLimitError):
    """The tenant has as many calls waiting as it may (status 429, ``retry-after``)."""


class StageRefusedError(StageRefused, openai.RateLimitError):
    """The deadline of this run cannot be met any more (status 429, ``retry-after``)."""


class WaitTooLongError(WaitTooLong, openai.APITimeoutError):
    """The stage waited longer than MAESTRO_MAX_WAIT_S for an engine."""


class QueueUnavailableError(QueueUnavailable, openai.APIConnectionError):
    """Redis cannot be reached, and MAESTRO_ON_OUTAGE says to fail then."""


class NoEngineFitsError(NoEngineFits, openai.BadRequestError):
    """No engine of the fleet could ever serve this stage (status 400)."""


class RunGoneError(RunGone, openai.OpenAIError):
    """The run that owned this call is gone."""


def as_sdk_error(error: MaestroError, httpx: ModuleType, url: str) -> MaestroError:
    """Return the same refusal in a class that is also the SDK's, so that the caller's handlers know it.

    ``httpx`` is the module that the caller's client is built on (`httpx_of`).
    """
    request = httpx.Request("POST", url)
    text = str(error)
    if isinstance(error, QueueFull | QuotaExceeded | StageRefused):
        kind = (
            QuotaExceededError
            if isinstance(error, QuotaExceeded)
            else QueueFullError
            if isinstance(error, QueueFull)
            else StageRefusedError
        )
        response = httpx.Response(429, headers={"retry-after": f"{error.retry_after_s:.1f}"}, request=request)
        refusal = cast("QueueFullError", kind.__new__(kind))
        openai.RateLimitError.__init__(refusal, text, response=response, body=None)
        refusal.retry_after_s = error.retry_after_s
        return refusal
    if isinstance(error, WaitTooLong):
        late = WaitTooLongError.__new__(WaitTooLongError)
        openai.APITimeoutError.__init__(late, request=request)
        late.message, late.args = text, (text,)
        return late
    if isinstance(error, QueueUnavailable):
        out = QueueUnavailableError.__new__(QueueUnavailableError)
        openai.APIConnectionError.__init__(out, message=text, request=request)
        return out
    if isinstance(error, NoEngineFits):
        misfit = NoEngineFitsError.__new__(NoEngineFitsError)
        openai.BadRequestError.__init__(misfit, text, response=httpx.Response(400, request=request), body=None)
        return misfit
    return error


def httpx_of(sdk_client: Any) -> ModuleType:
    """The HTTP module that the caller's client is built on: ``httpx2`` since openai 3, ``httpx`` before."""
    return _httpx_below(cast("type[object]", type(sdk_client._client)))


@functools.lru_cache(maxsize=64)
def _httpx_below(http_client: type[object]) -> ModuleType:
    families = [cls.__module__.split(".")[0] for cls in http_client.__mro__]
    return importlib.import_module(next((f for f in families if f in {"httpx", "httpx2"}), "httpx"))
