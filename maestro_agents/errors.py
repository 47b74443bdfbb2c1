"""Every error of Maestro, one tree. The message defaults to the docstring, so each explains itself.

MaestroError
  ConfigError            yours: a setting, a fleet file, an argument
  QueueError             the queue
    QueueUnavailable       Redis cannot be reached
    QueueFull              the bound was reached, and stayed so        (retry_after_s)
    QuotaExceeded          a quota of the tenant was reached, and stayed so   (retry_after_s)
    StageRefused           refused early: the deadline cannot be met   (retry_after_s)
    WaitTooLong            the gate's maximum wait passed
    RunGone                the run that owned the call ended while it waited
    IllegalMove            a bug: the lifecycle has no such move
  RoutingError
    NoEngineFits           no engine of the fleet could ever serve this stage
  EngineError
    EngineUnavailable      an engine does not answer
  ModelUnusable          a predictor's file is damaged, newer, or of other features; statistics go on
  WireError              a message that this version does not understand
"""

from __future__ import annotations


class MaestroError(Exception):
    """Maestro could not do what was asked."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip().split("\n")[0])


class ConfigError(MaestroError):
    """A setting, a fleet file or an argument is wrong."""


class QueueError(MaestroError):
    """The queue could not do what was asked."""


class QueueUnavailable(QueueError):
    """Redis cannot be reached. Check MAESTRO_REDIS_URL, or run `maestro doctor`."""


class _RetryLater(QueueError):
    """Try again later."""

    def __init__(self, message: str | None = None, *, retry_after_s: float = 1.0) -> None:
        base = message or (self.__doc__ or "").strip().split("\n")[0]
        super().__init__(f"{base} Retry after {retry_after_s:.1f} s.")
        self.retry_after_s = retry_after_s


class QueueFull(_RetryLater):
    """The queue for this model is full."""


class QuotaExceeded(_RetryLater):
    """The tenant has as many calls waiting as it may."""


class StageRefused(_RetryLater):
    """The deadline of this run cannot be met any more."""


class WaitTooLong(QueueError):
    """The stage waited longer than MAESTRO_MAX_WAIT_S for an engine."""


class RunGone(QueueError):
    """The run that owned this call is gone."""


class IllegalMove(QueueError):
    """The lifecycle of a stage has no such move."""


class RoutingError(MaestroError):
    """No place for this stage."""


class NoEngineFits(RoutingError):
    """No engine of the fleet could ever serve this stage."""


class EngineError(MaestroError):
    """An engine failed."""


class EngineUnavailable(EngineError):
    """An engine does not answer."""


class WireError(MaestroError):
    """A message that this version does not understand."""


class ModelUnusable(MaestroError):
    """A predictor's file cannot be used. Train one (`maestro predict train`); until then online statistics predict."""
