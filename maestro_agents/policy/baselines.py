"""What ours is compared with: the orders that other systems use, as pure functions of the same things.

Of two orders with ``-demote`` in their name the same late demotion as in ours is the only addition: runs that cannot meet
their deadline any more come after all that can.
"""

from __future__ import annotations

import math
from typing import Final

from maestro_agents.core import Prediction, ServiceClass, Ticket
from maestro_agents.policy.priority import Order, end_s, is_late, left_s

BEHIND_S: Final = 1e9
"""Further back than any moment: a class, or the late, as a whole after the others."""

BOOST_GAMMA_PER_S: Final = 0.02
"""Of `boost`: towards 0 the least served runs go first, towards infinity the first to arrive."""
BOOST_FLOOR_S: Final = 0.1
"""Of `boost`: less service than this counts as this much, else the boost of a new run had no end."""

GROUP_S: Final = 30.0
"""Of `qlm`: runs whose deadlines lie in the same so many seconds are one request group."""


def fcfs(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
    """First come, first served, by stage: what a plain engine does."""
    del prediction, now_s
    return ticket.pushed_at_s


def fcfs_run(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
    """First come, first served, by run."""
    del prediction, now_s
    return ticket.run_started_at_s or ticket.pushed_at_s


def edf(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
    """Earliest deadline first."""
    del prediction, now_s
    return min(ticket.deadline_at_s, ticket.limit_at_s, ticket.pushed_at_s + 1e6)


def llf(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
    """Least laxity first: deadline less the predicted rest of the run (the present moment is the same for all)."""
    return edf(ticket, prediction, now_s) - end_s(prediction)


def plas(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
    """Least attained service of the whole program first (Autellix, arXiv 2502.13965), without its discrete queues."""
    del ticket, now_s
    return prediction.attained_s


def srtf(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
    """Shortest predicted remaining time of the run first."""
    del ticket, now_s
    return left_s(prediction)


def maestro_paper(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
    """Interactive before batch, then shortest predicted remaining time (arXiv 2606.12950, without preemption)."""
    return srtf(ticket, prediction, now_s) + (BEHIND_S if ticket.service_class is ServiceClass.BATCH else 0.0)


def qlm(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
    """Request groups of like deadlines, the earliest group first, first come first served within (QLM, arXiv 2407.00047)."""
    deadline_s = edf(ticket, prediction, now_s)
    return math.floor(deadline_s / GROUP_S) * GROUP_S + 1e-6 * (ticket.pushed_at_s - deadline_s)


def boost(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
    """Arrival less a boost that is the larger the less the run was served yet: prediction-free, and made for the tail.

    ``b(s) = log(1 / (1 - exp(-gamma s))) / gamma`` (gamma-Boost, arXiv 2404.08826) of the attained service in place of the
    unknown size, in the spirit of arXiv 2606.18431.
    """
    served_s = max(prediction.attained_s, BOOST_FLOOR_S)
    start_s = fcfs_run(ticket, prediction, now_s)
    return start_s + math.log(-math.expm1(-BOOST_GAMMA_PER_S * served_s)) / BOOST_GAMMA_PER_S


def demoted(order: Order) -> Order:
    """The same order, with those that cannot meet their deadline any more after all that can."""

    def behind(ticket: Ticket, prediction: Prediction, now_s: float) -> float:
        return order(ticket, prediction, now_s) + (2 * BEHIND_S if is_late(ticket, prediction, now_s) else 0.0)

    behind.__doc__ = f"{(order.__doc__ or '').splitlines()[0]} Late runs after all others."
    return behind
