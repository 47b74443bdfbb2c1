"""What servers are told of a call beside its text, and what callers tell us: one record, each server's own words for it.

`outward` says it to an engine or a router in its dialect (``[[engine]] hints``), `said` reads all dialects back. The record has
vLLM's polarity: **the lower priority goes first**. A priority that Maestro gives is a moment: the milliseconds since 1970 by
which the call is due (`policy.wire_priority`); 0 goes before all. A dialect in which the larger goes first gets the negative,
fitted into the number that it takes, so that of two calls the one that is due first is never put second.

Nothing here is text of a prompt or an answer. What a caller says is untrusted: names are cut to `MAX_NAME`, numbers are
finite and in range, and what is none of that counts as not said.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from maestro_agents.core import Grant, ServiceClass, Ticket

MAX_NAME: Final = 256
"""Longest name that is taken from a caller, in characters."""

I32: Final = 2**31
TICK_MS: Final = 250
TICKS_SINCE_MS: Final = 1_577_836_800_000
"""Dynamo's priority is a 32-bit number: minus the quarter seconds since 2020, which fits until 2037."""

_MOMENT_TICKS: Final = 100_000_000
"""A number of Dynamo's that is further below 0 than this is such a moment; any other is somebody's own, small one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What is said of one call. None: nothing is."""

    run_id: str | None = None
    #: What outlives a run: a conversation (LangGraph's thread).
    session_id: str | None = None
    #: Agent name + node path.
    role: str | None = None
    workflow: str | None = None
    stage_id: str | None = None
    tenant: str | None = None
    #: LangGraph superstep.
    step: int | None = None
    service_class: ServiceClass | None = None
    #: Lower goes first. Ours are moments (ms since 1970); a caller's own compare only with the same caller's.
    priority: int | None = None
    #: Seconds from now until the run must have ended.
    deadline_s: float | None = None
    #: What is reserved for the answer (`Grant.output_tokens`), or what its caller expects of it.
    output_tokens: int | None = None
    #: Its parent waits for it while holding an engine.
    blocks_parent: bool | None = None

    @classmethod
    def of(cls, ticket: Ticket, grant: Grant | None, *, now_s: float, session_id: str = "") -> Said:
        """All that Maestro knows of a call that is about to leave. ``now_s``: the queue's clock."""
        return cls(
            run_id=ticket.run_id or None,
            session_id=session_id or None,
            role=ticket.role or None,
            workflow=ticket.workflow or None,
            stage_id=ticket.stage_id,
            tenant=ticket.tenant,
            step=ticket.step if ticket.run_id else None,
            service_class=ticket.service_class,
            priority=grant.priority if grant else 0,
            deadline_s=max(0.0, ticket.deadline_at_s - now_s) if math.isfinite(ticket.deadline_at_s) else None,
            output_tokens=(grant.output_tokens or None) if grant else None,
            blocks_parent=ticket.nested or None,
        )

    def over(self, other: Said) -> Said:
        """This, and what only ``other`` says."""
        return Said(**{n: getattr(other, n) if getattr(self, n) is None else getattr(self, n) for n in FIELDS})


FIELDS: Final = tuple(f.name for f in dataclasses.fields(Said))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """What goes into a request beside what its caller put there."""

    body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """One server's words."""

    #: Who understands them, and what has to be switched on there.
    server: str
    needs: str
    #: Where each field of `Said` goes, for people.
    words: Mapping[str, str]
    #: How its priority relates to ours.
    order: str
    say: Callable[[Said, float], Sent]


def outward(dialect: str, call: Said, *, now_s: float | None = None) -> Sent:
    """What a server of this dialect is told of a call; nothing where the dialect is one that only a newer release knows.

    ``now_s``: epoch seconds, left out: now.
    """
    return DIALECTS.get(dialect, DIALECTS["none"]).say(call, time.time() if now_s is None else now_s)


def said(body: Mapping[str, Any], headers: Mapping[str, str], *, now_s: float | None = None) -> Said:
    """What a request says of itself, in whatever dialect. Where several say something: ``x-maestro-*`` headers, then
    ``vllm_xargs.agentic_context``, Dynamo's headers, ``nvext.agent_hints``, ``agent_hint``, llm-d's headers, SMG's, ``priority``
    and ``x-session-id``. Never raises.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    now_s = time.time() if now_s is None else now_s
    found = Said()
    for read in _READERS:
        found = found.over(read(body, lower, now_s))
    return found


def merged(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Both, table by table: what a caller put beside our words stays; the words themselves are ours."""
    out = dict(theirs)
    for key, value in ours.items():
        before, mine = _opened(out.get(key)), _opened(value)
        both = value if before is None or mine is None else merged(before, mine)
        out[key] = _packed(both) if isinstance(value, str) and both is not value else both
    return out


def _opened(value: object) -> Mapping[str, Any] | None:
    """A table, also one that is written as text."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else None


def _packed(table: Mapping[str, Any]) -> str:
    return json.dumps(table, separators=(",", ":"))


# -- outwards ----------------------------------------------------------------------------------------------------------
def _table(**values: Any) -> dict[str, Any]:
    """What is known of it."""
    return {name: value for name, value in values.items() if value is not None}


def _priority(call: Said) -> dict[str, Any]:
    return _table(priority=call.priority)


def _vllm(call: Said, now_s: float) -> Sent:
    del now_s
    return Sent(body=_priority(call))


def _vllm_router(call: Said, now_s: float) -> Sent:
    """The context is a table written as text: vLLM takes text and numbers for ``vllm_xargs`` and answers a table with 400, the
    router reads both and passes on what it got (vLLM 0.32, vllm-router 0.1.17). It refuses ``blocks_parent`` without the
    parent's id, which is not known here.
    """
    del now_s
    run = call.run_id or call.stage_id
    context = _table(
        program_id=":".join(p for p in (run, call.role) if p) or None,
        task_id=call.run_id,
        session_id=call.session_id or call.run_id,
        agent_id=call.role,
        agent_role=call.role,
        workflow_profile_id=call.workflow,
        request_id=call.stage_id,
        step_id=call.step,
        priority=None if call.priority is None else -call.priority,
        deadline_seconds=call.deadline_s,
        expected_output_length=call.output_tokens,
    )
    return Sent(body={**_priority(call), **({"vllm_xargs": {"agentic_context": _packed(context)}} if context else {})})


def _dynamo(call: Said, now_s: float) -> Sent:
    del now_s
    hints = _table(priority=None if call.priority is None else _dynamo_priority(call.priority), osl=call.output_tokens)
    headers: dict[str, str] = {}
    if session := call.session_id or call.run_id:
        headers["x-dynamo-session-id"] = _header(f"{session}:{call.role}" if call.role else session)
    return Sent(body={"nvext": {"agent_hints": hints}} if hints else {}, headers=headers)


def _dynamo_priority(priority: int) -> int:
    """Minus the ticks since 2020, between -2^31 and 0."""
    return max(-I32, min(0, -((priority - TICKS_SINCE_MS) // TICK_MS)))


def _ours(dynamo: int) -> int:
    """The moment of such a number, or its negative where it is no moment."""
    return -dynamo if dynamo > -_MOMENT_TICKS else TICKS_SINCE_MS - dynamo * TICK_MS


def _llm_d(call: Said, now_s: float) -> Sent:
    headers: dict[str, str] = {}
    if call.tenant:
        headers["x-llm-d-inference-fairness-id"] = _header(call.tenant)
    if call.service_class:
        headers["x-llm-d-inference-objective"] = call.service_class.value
    if call.priority is not None:
        headers["x-llm-d-slo-ttft-ms"] = str(max(1, call.priority - int(now_s * 1000.0)))
    return Sent(body=_priority(call), headers=headers)


_SMG: Final = {ServiceClass.INTERACTIVE: "interactive", ServiceClass.BATCH: "bulk"}


def _smg(call: Said, now_s: float) -> Sent:
    del now_s
    return Sent(headers={"X-SMG-Priority": _SMG[call.service_class]} if call.service_class else {})


def _none(call: Said, now_s: float) -> Sent:
    del call, now_s
    return Sent()


def _header(text: str) -> str:
    """As a header takes it: printable ASCII, no longer than a name of ours."""
    return "".join(c if " " < c <= "~" else "_" for c in text[:MAX_NAME])


DIALECTS: Final[Mapping[str, Dialect]] = {
    "vllm": Dialect(
        server="vLLM",
        needs="`vllm serve --scheduling-policy priority`",
        words={"priority": "body `priority`"},
        order="as ours: lower first",
        say=_vllm,
    ),
    "vllm-router": Dialect(
        server="[vllm-router](https://github.com/vllm-project/router), over vLLM",
        needs="`vllm-router --enable-program-scheduling`",
        words={
            "run_id": "in body `vllm_xargs.agentic_context` (JSON text): `task_id`; with the role `program_id`",
            "session_id": "`session_id` (else the run)",
            "role": "`agent_id`, `agent_role`",
            "workflow": "`workflow_profile_id`",
            "stage_id": "`request_id`",
            "step": "`step_id`",
            "priority": "`priority`, and body `priority` for the engine behind",
            "deadline_s": "`deadline_seconds`",
            "output_tokens": "`expected_output_length`",
        },
        order="larger first: our number, negated",
        say=_vllm_router,
    ),
    "dynamo": Dialect(
        server="NVIDIA Dynamo",
        needs="a router that queues (`--router-queue-threshold`), and priority scheduling in its engines",
        words={
            "session_id": "header `x-dynamo-session-id` (else the run), with the role",
            "priority": "`nvext.agent_hints.priority`",
            "output_tokens": "`nvext.agent_hints.osl`",
        },
        order="larger first, 32 bits: minus the quarter seconds since 2020",
        say=_dynamo,
    ),
    "llm-d": Dialect(
        server="llm-d (router 0.9 or newer), over vLLM",
        needs="flow control with `slo-deadline-ordering-policy`; an InferenceObjective `interactive` and one `batch`",
        words={
            "tenant": "header `x-llm-d-inference-fairness-id`",
            "service_class": "header `x-llm-d-inference-objective`",
            "priority": "header `x-llm-d-slo-ttft-ms`, and body `priority` for the engine behind",
        },
        order="milliseconds from now until the call is due, at least 1: less first",
        say=_llm_d,
    ),
    "smg": Dialect(
        server="SMG",
        needs="`smg launch --priority-scheduler-enabled --priority-scheduler-default-max-class interactive`",
        words={"service_class": "header `X-SMG-Priority`: `interactive` or `bulk`"},
        order="by class alone: no moment can be said",
        say=_smg,
    ),
    "none": Dialect(server="anything else", needs="", words={}, order="nothing is said", say=_none),
}


# -- inwards -----------------------------------------------------------------------------------------------------------
def _from_maestro(body: Mapping[str, Any], headers: Mapping[str, str], now_s: float) -> Said:
    del body, now_s

    def get(name: str) -> str | None:
        return headers.get(f"x-maestro-{name}")

    return Said(
        run_id=_name(get("run")),
        session_id=_name(get("session")),
        role=_name(get("role")),
        workflow=_name(get("workflow")),
        stage_id=_name(get("stage")),
        step=_count(get("step")),
        service_class=_class(get("class")),
        priority=_whole(get("priority")),
        deadline_s=_seconds(get("deadline-s")),
        output_tokens=_count(get("output-tokens")),
        blocks_parent=_flag(get("blocks-parent")),
    )


def _from_agentic_context(body: Mapping[str, Any], headers: Mapping[str, str], now_s: float) -> Said:
    del headers, now_s
    context = _inner(body, "vllm_xargs", "agentic_context")
    role, stage = _name(context.get("agent_id")) or _name(context.get("agent_role")), _name(context.get("request_id"))
    program, run = _name(context.get("program_id")), _name(context.get("task_id"))
    if run is None and program and not (stage and program.startswith(stage)):  # that is ours, of a call outside any run
        run = program
    session = _name(context.get("session_id"))
    return Said(
        run_id=run,
        session_id=None if session == run else session,
        role=role,
        workflow=_name(context.get("workflow_profile_id")),
        stage_id=stage,
        step=_count(context.get("step_id")),
        priority=_minus(_whole(context.get("priority"))),
        deadline_s=_seconds(context.get("deadline_seconds")),
        output_tokens=_count(context.get("expected_output_length")),
        blocks_parent=_flag(context.get("blocks_parent")),
    )


def _from_dynamo(body: Mapping[str, Any], headers: Mapping[str, str], now_s: float) -> Said:
    del now_s
    hints = _inner(body, "nvext", "agent_hints")
    found = _whole(headers.get("x-dynamo-request-priority"))
    number = _whole(hints.get("priority")) if found is None else found
    return Said(
        session_id=_name(headers.get("x-dynamo-session-id")),
        priority=None if number is None else _ours(number),
        output_tokens=_count(hints.get("osl")),
    )


def _from_agent_hint(body: Mapping[str, Any], headers: Mapping[str, str], now_s: float) -> Said:
    """The proposal of vLLM's issue 52113, as vllm-router reads it too."""
    del headers, now_s
    hint = _inner(body, "agent_hint")
    return Said(session_id=_name(hint.get("session_id")), blocks_parent=_flag(hint.get("blocks_parent")))


def _from_llm_d(body: Mapping[str, Any], headers: Mapping[str, str], now_s: float) -> Said:
    del body

    def get(name: str) -> str | None:
        """Under its name, or the one that it had before llm-d router 0.9."""
        old = name if name.startswith("slo") else f"gateway-{name}"
        return headers.get(f"x-llm-d-{name}", headers.get(f"x-{old}"))

    due_ms = _count(get("slo-ttft-ms"))
    return Said(
        tenant=_name(get("inference-fairness-id")),
        service_class=_class(get("inference-objective")),
        priority=None if due_ms is None else int(now_s * 1000.0) + due_ms,
    )


def _from_smg(body: Mapping[str, Any], headers: Mapping[str, str], now_s: float) -> Said:
    del body, now_s
    name = headers.get("x-smg-priority", "").strip().lower()
    known = {"system": ServiceClass.INTERACTIVE, "interactive": ServiceClass.INTERACTIVE, "bulk": ServiceClass.BATCH}
    return Said(service_class=known.get(name))


def _from_vllm(body: Mapping[str, Any], headers: Mapping[str, str], now_s: float) -> Said:
    del now_s
    return Said(priority=_whole(body.get("priority")), session_id=_name(headers.get("x-session-id")))


_READERS: Final = (
    _from_maestro,
    _from_agentic_context,
    _from_dynamo,
    _from_agent_hint,
    _from_llm_d,
    _from_smg,
    _from_vllm,
)
"""Who is believed first."""


def _inner(body: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    found = body
    for name in path:
        found = _opened(found.get(name)) or {}
    return found


def _name(value: object) -> str | None:
    return (value.strip()[:MAX_NAME] or None) if isinstance(value, str) and value.isprintable() else None


def _number(value: object) -> float | None:
    """A number of no more than 64 bits, also where a header spells it."""
    if isinstance(value, str) and len(value) <= MAX_NAME:
        try:
            value = float(value)
        except ValueError:
            return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return cast("float", value) if number and -(2**63) < cast("float", value) < 2**63 else None


def _whole(value: object) -> int | None:
    found = _number(value)
    return None if found is None else int(found)


def _count(value: object) -> int | None:
    found = _whole(value)
    return found if found is not None and found >= 0 else None


def _seconds(value: object) -> float | None:
    found = _number(value)
    return float(found) if found is not None and found >= 0 else None


def _minus(value: int | None) -> int | None:
    return None if value is None else -value


def _flag(value: object) -> bool | None:
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())


def _class(value: str | None) -> ServiceClass | None:
    try:
        return ServiceClass((value or "").strip().lower())
    except ValueError:
        return None
