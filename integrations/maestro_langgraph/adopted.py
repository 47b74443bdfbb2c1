"""Runs that no handler watches: their calls are known to belong together, their end is not.

A model given to `maestro.wrap_model` may be called by a graph that nobody gave to Maestro. LangGraph hands every node of
one graph run the same run control (`langgraph.runtime.Runtime.control`), sub-graphs included: calls that see the same one
share a run here. It began with its first call and counts as ended well by its last one, `IDLE_S` later or when the process
ends. The workflow behind it stays unknown, so nothing is predicted of what follows a call.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final, Protocol
from uuid import UUID, uuid4
from weakref import WeakSet

from langgraph.runtime import RunControl, get_runtime

from maestro_langgraph import runs
from maestro_langgraph.options import Options
from maestro_langgraph.runs import Run

IDLE_S: Final = 300.0
MAX_ADOPTED: Final = 4_096


class _Call(Protocol):
    @property
    def ended(self) -> bool: ...


@dataclass(slots=True)
class _Adopted:
    callback_id: UUID = field(default_factory=uuid4)
    seen_s: float = field(default_factory=time.monotonic)
    calls: WeakSet[_Call] = field(default_factory=WeakSet["_Call"])


_lock = threading.Lock()
#: The one that was idle longest comes first. The key is kept, so that its identity is not given to another run.
_adopted: OrderedDict[RunControl, _Adopted] = OrderedDict()
_by_root: dict[UUID, RunControl] = {}


def find(options: Options, call: _Call) -> Run | None:
    """Return the run of the node that makes this call here, begun now where it is new; None outside a graph."""
    try:
        control = get_runtime().control
    except Exception:  # not in a graph
        return None
    if control is None:
        return None
    with _lock:
        _end_idle()
        known = _adopted.get(control)
        if known is None:
            known = _adopted[control] = _Adopted()
            _by_root[known.callback_id] = control
            runs.start(known.callback_id, None, options=options, workflow=None, name=None)
        _adopted.move_to_end(control)
        known.seen_s = time.monotonic()
        known.calls.add(call)
        return runs.find(known.callback_id)


def seen(run: Run) -> None:
    """Note that a call of this run ended. Of a run that a handler watches, nothing is noted."""
    if run.root not in _by_root:
        return
    with _lock:
        control = _by_root.get(run.root)
        if control is not None:
            _adopted[control].seen_s = time.monotonic()


def _end_idle(idle_s: float = IDLE_S) -> None:
    """End what has been idle, oldest first; the oldest in any case where there are too many."""
    now_s = time.monotonic()
    while _adopted:
        control, oldest = next(iter(_adopted.items()))
        idle = now_s - oldest.seen_s >= idle_s and all(call.ended for call in tuple(oldest.calls))
        if not idle and len(_adopted) < MAX_ADOPTED:
            return
        del _adopted[control]
        _by_root.pop(oldest.callback_id, None)
        runs.end(oldest.callback_id, None, ago_s=now_s - oldest.seen_s)


def _end_all() -> None:
    with _lock:
        _end_idle(0.0)


def _clear() -> None:
    global _lock
    _lock = threading.Lock()
    _adopted.clear()
    _by_root.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_clear)
atexit.register(_end_all)
