"""The nouns: what cannot be built, what travels, which moves there are."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_agents.core import (
    TERMINAL,
    TRANSITIONS,
    Command,
    EngineSpec,
    ServiceClass,
    Status,
    Ticket,
    kv_need_bytes,
    move,
)
from maestro_agents.errors import IllegalMove, WireError


@given(
    stage_id=st.text(min_size=1), role=st.text(), due=st.floats(allow_nan=False), tokens=st.integers(0, 10**6),
    bound=st.none() | st.integers(0, 10**5), cls=st.sampled_from(ServiceClass), excluded=st.lists(st.text(), max_size=3),
    features=st.lists(st.floats(allow_nan=False), max_size=5), nested=st.booleans(),
)  # fmt: skip
def test_a_ticket_survives_the_wire(
    stage_id: str, role: str, due: float, tokens: int, bound: int | None, cls: ServiceClass, excluded: list[str],
    features: list[float], nested: bool,
) -> None:  # fmt: skip
    """Whatever a ticket holds, decoding what was encoded gives it back."""
    ticket = Ticket(
        stage_id=stage_id, client_id="c", model="m", role=role, due_at_s=due, prompt_tokens=tokens, max_tokens=bound,
        service_class=cls, excluded_engines=tuple(excluded), features=tuple(features), nested=nested,
    )  # fmt: skip
    assert Ticket.decode(ticket.encode()) == ticket


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"v": "x"}',
        '{"v": 1}',
        '{"v": 99, "stage_id": "s"}',
        "null",
        '{"v":1,"stage_id":"s","client_id":"c","model":"m","service_class":"vip"}',
    ],
)
def test_what_is_no_ticket_is_said_to_be_none(text: str) -> None:
    """Garbage and tickets of a distant version raise `WireError`, nothing else."""
    with pytest.raises(WireError):
        Ticket.decode(text)


def test_a_field_of_a_newer_release_is_ignored() -> None:
    """Within a version, an unknown field does not stop an older reader."""
    assert Ticket.decode('{"v":1,"stage_id":"s","client_id":"c","model":"m","mood":"good"}').stage_id == "s"


@pytest.mark.parametrize(
    "wrong", [{"stage_id": ""}, {"model": ""}, {"prompt_tokens": -1}, {"max_tokens": -5}, {"due_at_s": math.nan}]
)
def test_a_wrong_ticket_cannot_be_built(wrong: dict[str, object]) -> None:
    """The constructor refuses what no queue could hold."""
    with pytest.raises(WireError):
        Ticket(**{"stage_id": "s", "client_id": "c", "model": "m", **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("status", [None, *Status])
@pytest.mark.parametrize("command", list(Command))
def test_a_move_is_in_the_table_or_raises(status: Status | None, command: Command) -> None:
    """Every pair of status and command is allowed by the table or is an `IllegalMove`."""
    allowed = TRANSITIONS.get((status, command))
    if allowed is None:
        with pytest.raises(IllegalMove):
            move(status, command)
    else:
        for to in allowed:
            assert move(status, command, to) is to


def test_nothing_leads_out_of_a_terminal_status() -> None:
    """One terminal record per stage: it is never rewritten."""
    assert not [pair for pair in TRANSITIONS if pair[0] in TERMINAL]


def test_a_kv_reservation_is_prompt_plus_output_within_the_bounds() -> None:
    """Bytes = (prompt + output) x bytes per token, capped by the caller's max_tokens and the model's length."""
    spec = EngineSpec(engine_id="e", url="u", model="m", kv_bytes_per_token=131_072, max_model_len=1_000)
    ticket = Ticket(stage_id="s", client_id="c", model="m", prompt_tokens=100)
    assert kv_need_bytes(ticket, 50.2, spec) == 151 * 131_072
    assert kv_need_bytes(ticket.evolve(max_tokens=10), 50.2, spec) == 110 * 131_072
    assert kv_need_bytes(ticket, 5_000, spec) == 1_000 * 131_072
