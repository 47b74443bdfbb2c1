"""In which order: a moment for every waiting stage, smaller first.

A moment, not a rank: it is fixed when the stage is pushed, so the queue never re-sorts, and older work comes due by
itself. The planner writes a new one only where a lost deadline, or a prediction that changed much, moves it far. Each
order is a pure function of the ticket, its prediction and the time; a user's own is one more such function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from maestro_agents.core import Prediction, Ticket

Order = Callable[[Ticket, Prediction, float], float]
"""(ticket, prediction, now_s) -> due_at_s."""

DOUBT: Final = 0.25
"""Share of what is predicted to be left of a run that must fit before its deadline, else it counts as lost: predictions are
often twice or half the truth, and a run that is given up wrongly costs more than one that is tried in vain."""

MAX_SLACK_S: Final = 600.0
"""A deadline further away than this (or none) counts as this far."""

LATE_S: Final = 3600.0
"""By how much a stage comes due later once its run is lost. With less than that an overload that lasts is spent on runs that
were lost long ago."""

MAX_JOIN_S: Final = 60.0
"""Most by which a stage lets others pass since a sibling that its run waits for takes longer."""

TOLERATED_DEBT_S: Final = 30.0
"""A tenant that is ahead of its share by less than this is hardly held back; from there on the more the further."""


def left_s(prediction: Prediction) -> float:
    """Predicted LLM seconds until the run ends, this stage included."""
    return prediction.service_s + prediction.remaining_s


def end_s(prediction: Prediction) -> float:
    """Predicted seconds until the run ends if it never waits again: its LLM work, its tools and its code."""
    return left_s(prediction) + prediction.remaining_tool_s


def is_late(ticket: Ticket, prediction: Prediction, now_s: float) -> bool:
    """The run cannot meet its deadline any more, or the stage its own limit, even if all goes as predicted."""
    return ticket.deadline_at_s - now_s < end_s(prediction) or ticket.limit_at_s - now_s < prediction.service_s


def is_lost(ticket: Ticket, prediction: Prediction, now_s: float) -> bool:
    """The same beyond reasonable doubt: not even a `DOUBT` of the predicted rest of the run would fit."""
    rest_s = DOUBT * (prediction.remaining_s + prediction.remaining_tool_s)
    return min(ticket.deadline_at_s - rest_s, ticket.limit_at_s) - now_s < prediction.service_s


def ours(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
    """The deadline plus what is left of the run: who can still make it first, the shorter of two as urgent; lost runs later.

    A stage of a fan-out lets others pass for as long as a slower sibling keeps its run waiting anyway; a tenant ahead of its
    share (`fairness`) lets the others pass. Bound: a stage is never passed by one pushed more than ``MAX_SLACK_S + LATE_S +
    MAX_JOIN_S + left`` seconds after it, and ``debt x (1 + debt / TOLERATED_DEBT_S)`` where its own tenant owes.
    """
    due_s = on_time(ticket, prediction, now_s)
    return due_s + LATE_S if is_lost(ticket, prediction, now_s) else due_s


def on_time(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
    """Ours for runs that can make it, and an ablation by itself: lost runs keep their turn."""
    del now_s
    due_s = min(ticket.deadline_at_s, ticket.limit_at_s, ticket.pushed_at_s + MAX_SLACK_S)
    return due_s + left_s(prediction) + min(prediction.slack_s, MAX_JOIN_S) + _yield_s(prediction)


def without_deadline(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
    """An ablation: what is left of the run, whenever it must have ended."""
    del now_s
    return ticket.pushed_at_s + left_s(prediction) + min(prediction.slack_s, MAX_JOIN_S) + _yield_s(prediction)


def _yield_s(prediction: Prediction) -> float:
    return prediction.debt_s * (1.0 + prediction.debt_s / TOLERATED_DEBT_S)
