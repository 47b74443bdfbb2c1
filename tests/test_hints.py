"""Hints: what servers are told of a call, each in its own words, and what callers tell us in theirs."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_agents.cli import doctor
from maestro_agents.core import EngineSpec, Grant, ServiceClass, Ticket
from maestro_agents.errors import ConfigError
from maestro_agents.fleet import load_fleet, write_fleet
from maestro_agents.hints import DIALECTS, FIELDS, MAX_NAME, TICK_MS, Said, merged, outward, said
from maestro_agents.simulator.engine import CPU_TINY
from maestro_langgraph import maestro
from maestro_serving import urgency
from maestro_serving.emulator import EmulatedModel, Emulator, EmulatorConfig
from maestro_serving.processes import free_port
from maestro_serving.urgency import burst
from maestro_serving.vllm import VllmProbe
from tests.stub_openai import Seen, StubServer, fleet_toml, managed, stub_servers

NOW_S = 1_795_000_000.0
MOMENTS = st.integers(min_value=1_700_000_000_000, max_value=2_100_000_000_000)
"""Of the years that a release lives in: 2023 to 2036."""
NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters='"{'), min_size=1, max_size=60)

CALLS = st.builds(
    Said,
    run_id=st.none() | NAMES,
    session_id=st.none() | NAMES,
    role=st.none() | NAMES,
    workflow=st.none() | NAMES,
    stage_id=NAMES.map(lambda name: f"stage-{name}"),
    tenant=st.none() | NAMES,
    step=st.none() | st.integers(0, 10_000),
    service_class=st.sampled_from(ServiceClass),
    priority=MOMENTS | st.just(0),
    deadline_s=st.none() | st.floats(0, 1e6),
    output_tokens=st.none() | st.integers(1, 100_000),
)


def back(dialect: str, call: Said) -> Said:
    """What somebody reads who gets what we send."""
    sent = outward(dialect, call, now_s=NOW_S)
    body: dict[str, Any] = json.loads(json.dumps(dict(sent.body)))  # as it travels
    return said(body, sent.headers, now_s=NOW_S)


def strength(dialect: str, call: Said) -> Any:
    """By what a server of this dialect orders: less goes first."""
    sent = outward(dialect, call, now_s=NOW_S)
    match dialect:
        case "vllm":
            return sent.body["priority"]
        case "vllm-router":
            return -json.loads(sent.body["vllm_xargs"]["agentic_context"])["priority"]
        case "dynamo":
            return -sent.body["nvext"]["agent_hints"]["priority"]
        case "llm-d":
            return int(sent.headers["x-llm-d-slo-ttft-ms"])
        case "smg":
            return ("system", "interactive", "default", "bulk").index(sent.headers["X-SMG-Priority"])
        case _:
            return 0


# -- every dialect ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", DIALECTS)
@given(call=CALLS)
def test_what_a_dialect_can_say_is_read_back_as_it_was_meant(dialect: str, call: Said) -> None:
    """Every field that a dialect has a word for comes back, in our polarity; no other is made up."""
    got, words = back(dialect, call), DIALECTS[dialect].words
    for name in set(FIELDS) - {"priority", "session_id"}:
        assert getattr(got, name) == (getattr(call, name) if name in words else None), name
    if "priority" not in words:
        assert got.priority is None
    elif dialect == "llm-d":  # whatever is overdue is due at once
        assert got.priority == max(call.priority or 0, int(NOW_S * 1000) + 1)
    else:
        assert call.priority is not None
        assert got.priority is not None
        assert 0 <= call.priority - got.priority < (TICK_MS if dialect == "dynamo" and call.priority else 1)
    if dialect == "vllm-router":
        assert got.session_id == (call.session_id if call.session_id != call.run_id else None)
    elif dialect == "dynamo":
        session = call.session_id or call.run_id
        assert got.session_id == (session and (f"{session}:{call.role}" if call.role else session))


@pytest.mark.parametrize("dialect", DIALECTS)
@given(first=MOMENTS | st.just(0), second=MOMENTS)
def test_what_is_due_first_is_never_put_second(dialect: str, first: int, second: int) -> None:
    """Of two calls of a class no dialect turns the order round, whatever number it takes and wherever that ends."""
    calls = [Said(stage_id="s", service_class=ServiceClass.BATCH, priority=p) for p in sorted((first, second))]
    sooner, later = (strength(dialect, c) for c in calls)
    assert sooner <= later


@pytest.mark.parametrize(("dialect", "apart_ms"), [("vllm", 1), ("vllm-router", 1), ("dynamo", TICK_MS), ("llm-d", 1)])
@given(moment=st.integers(int(NOW_S * 1000) + 10, 2_100_000_000_000))
def test_two_moments_are_told_apart_as_finely_as_the_dialect_can(dialect: str, apart_ms: int, moment: int) -> None:
    """A millisecond, or for Dynamo a quarter of a second, between two calls that are still to come makes a difference."""
    sooner, later = (Said(priority=p, stage_id="s") for p in (moment, moment + apart_ms))
    assert strength(dialect, sooner) < strength(dialect, later)


def test_numbers_are_of_the_types_and_ranges_that_each_server_reads() -> None:
    """Dynamo's priority has 32 bits, also in 1970 and 2100; vllm-router's numbers are numbers; header values are ASCII text."""
    for priority in (0, 1, 10**15, -(10**15)):
        number = outward("dynamo", Said(priority=priority)).body["nvext"]["agent_hints"]["priority"]
        assert -(2**31) <= number <= 0
    sent = outward("vllm-router", Said(run_id="r", role="a", step=3, priority=5, deadline_s=2.5, output_tokens=7))
    xargs = sent.body["vllm_xargs"]
    assert all(isinstance(v, str) for v in xargs.values())  # what vLLM behind the router takes
    context = json.loads(xargs["agentic_context"])
    assert (context["step_id"], context["priority"], context["deadline_seconds"]) == (3, -5, 2.5)
    sent = outward("llm-d", Said(tenant="acmé\r\nx: y", service_class=ServiceClass.BATCH))
    assert sent.headers["x-llm-d-inference-fairness-id"] == "acm___x:_y"


def test_a_call_is_described_by_its_ticket_and_its_grant() -> None:
    """The record has the run, role, place and class of the ticket, the grant's moment and tokens, and seconds to the deadline."""
    ticket = Ticket(
        stage_id="s", client_id="c", model="m", run_id="r", role="a:b", step=2, deadline_at_s=NOW_S + 9, nested=True
    )
    grant = Grant(stage_id="s", engine_id="e", token=1, epoch=1, kv_bytes=0, output_tokens=64, priority=77)
    call = Said.of(ticket, grant, now_s=NOW_S, session_id="t")
    assert (call.run_id, call.session_id, call.role, call.step) == ("r", "t", "a:b", 2)
    assert (call.priority, call.output_tokens, call.deadline_s, call.blocks_parent) == (77, 64, 9.0, True)
    plain = Said.of(ticket.evolve(run_id="", deadline_at_s=math.inf, nested=False), None, now_s=NOW_S)
    assert (plain.run_id, plain.deadline_s, plain.priority, plain.step) == (None, None, 0, None)


# -- inwards -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("body", "headers", "meant"),
    [
        ({"priority": 5}, {}, {"priority": 5}),
        (
            {"vllm_xargs": {"agentic_context": {"program_id": "p", "priority": 10}}},
            {},
            {"run_id": "p", "priority": -10},
        ),
        ({"nvext": {"agent_hints": {"priority": 10, "osl": 9}}}, {}, {"priority": -10, "output_tokens": 9}),
        ({"nvext": {"agent_hints": {"priority": 1}}}, {"X-Dynamo-Request-Priority": "7"}, {"priority": -7}),
        ({"agent_hint": {"session_id": "s", "blocks_parent": True}}, {}, {"session_id": "s", "blocks_parent": True}),
        ({}, {"X-SMG-Priority": " Bulk "}, {"service_class": ServiceClass.BATCH}),
        ({}, {"x-gateway-inference-fairness-id": "acme"}, {"tenant": "acme"}),
        ({}, {"x-slo-ttft-ms": "1500"}, {"priority": int(NOW_S * 1000) + 1500}),
        (
            {"priority": 5},
            {
                "X-Maestro-Run": "r",
                "x-maestro-class": "batch",
                "x-maestro-deadline-s": "4.5",
                "x-maestro-priority": "3",
            },
            {"run_id": "r", "service_class": ServiceClass.BATCH, "deadline_s": 4.5, "priority": 3},
        ),
    ],
)
def test_every_callers_words_are_read_in_our_polarity(
    body: Mapping[str, Any], headers: Mapping[str, str], meant: Mapping[str, Any]
) -> None:
    """What other people's clients say, as those write it, older names and spellings included."""
    assert said(body, headers, now_s=NOW_S) == Said(**meant)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
WORDS = ("agentic_context", "agent_hints", "priority", "osl", "session_id", "program_id", "step_id", "deadline_seconds")


@given(
    body=st.dictionaries(
        st.sampled_from(("vllm_xargs", "nvext", "agent_hint", "priority")),
        JSON | st.dictionaries(st.sampled_from(WORDS), JSON | st.dictionaries(st.sampled_from(WORDS), JSON)),
    ),
    headers=st.dictionaries(
        st.sampled_from(("x-maestro-run", "x-maestro-deadline-s", "x-smg-priority", "x-slo-ttft-ms", "X-Session-Id")),
        st.text(max_size=400),
    ),
)
def test_nothing_that_a_caller_sends_breaks_the_reading_or_passes_as_something_else(
    body: dict[str, Any], headers: dict[str, str]
) -> None:
    """Whatever the types and sizes: names stay short and printable, numbers finite and of 64 bits, or nothing was said."""
    got = said(body, headers, now_s=NOW_S)
    for name in ("run_id", "session_id", "role", "workflow", "stage_id", "tenant"):
        value = getattr(got, name)
        assert value is None or (0 < len(value) <= MAX_NAME and value.isprintable())
    for number in (got.step, got.output_tokens, got.deadline_s):
        assert number is None or 0 <= number < 2**63
    assert got.priority is None or abs(got.priority) <= 2**63


def test_what_a_caller_put_beside_our_words_stays() -> None:
    """Tables are merged, also those written as text; the words that are ours are ours."""
    ours = outward("vllm-router", Said(run_id="r", priority=5)).body
    theirs = {"vllm_xargs": {"mine": 1, "agentic_context": {"priority": 99, "spawn_reason": "x"}}, "top_k": 3}
    found = merged(theirs, ours)
    context = json.loads(found["vllm_xargs"]["agentic_context"])
    assert (context["priority"], context["spawn_reason"], context["task_id"]) == (-5, "x", "r")
    assert (found["vllm_xargs"]["mine"], found["top_k"]) == (1, 3)
    assert merged({"priority": {"a": 1}}, {"priority": 4}) == {"priority": 4}


# -- the gate ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def servers() -> Iterator[list[StubServer]]:
    """The caller's own provider, and an engine."""
    with stub_servers(2) as servers:
        yield servers


def ask(servers: list[StubServer], tmp_path: Path, dialect: str, *, wrapped: bool = False, **more: Any) -> Seen:
    """One call through the gate to an engine of this dialect; the request as it arrived there."""
    for server in servers:
        server.reset()
    with managed(tmp_path, {"a": servers[1].url}, more=f'hints = "{dialect}"'):
        client = openai.OpenAI(base_url=servers[0].url, api_key="k", max_retries=0)
        if wrapped:
            from langchain_openai import ChatOpenAI

            llm = maestro.wrap_model(ChatOpenAI(model="stub", base_url=servers[0].url, api_key="k", max_retries=0))  # pyright: ignore[reportArgumentType]
            llm.invoke("hi", extra_body=more.get("extra_body"))
        else:
            maestro.install()
            client.chat.completions.create(model="stub", messages=[{"role": "user", "content": "hi"}], **more)
    (seen,) = servers[1].requests
    return seen


@pytest.mark.parametrize("wrapped", [False, True], ids=["sdk", "wrap_model"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_gate_says_what_the_engines_dialect_has_words_for(
    servers: list[StubServer], tmp_path: Path, dialect: str, wrapped: bool
) -> None:
    """A call that leaves for an engine carries our words in body and headers, and nothing of any other dialect."""
    seen = ask(servers, tmp_path, dialect, wrapped=wrapped, extra_body={"nvext": {"annotations": ["x"]}})
    got = said(seen.body, seen.headers)
    words = DIALECTS[dialect].words
    assert (got.priority is not None) == ("priority" in words)
    assert (got.stage_id is not None) == ("stage_id" in words)
    assert (got.service_class is ServiceClass.INTERACTIVE) == ("service_class" in words)
    assert ("priority" in seen.body) == (dialect in {"vllm", "vllm-router", "llm-d"})
    assert seen.body["nvext"]["annotations"] == ["x"]  # the caller's own
    told = {name for name in seen.headers if name.startswith(("x-", "session"))} - {"x-stainless-raw-response"}
    assert {n for n in told if not n.startswith("x-stainless")} == {
        n.lower() for n in outward(dialect, Said(tenant="t", service_class=ServiceClass.BATCH, priority=1)).headers
    }


def test_an_unknown_dialect_is_told_with_the_ones_there_are(tmp_path: Path) -> None:
    """The fleet file names the line and all dialects; a known one is kept when the fleet is written again."""
    path = tmp_path / "fleet.toml"
    path.write_text(fleet_toml({"a": "http://127.0.0.1:1/v1"}, more='hints = "vlm"'))
    with pytest.raises(
        ConfigError, match=r"fleet\.toml:\d+: hints = 'vlm': .*vllm, vllm-router, dynamo, llm-d, smg, none"
    ):
        load_fleet(path)
    path.write_text(fleet_toml({"a": "http://127.0.0.1:1/v1"}, more='hints = "smg"'))
    write_fleet(load_fleet(path), path)
    assert load_fleet(path).engines[0].hints == "smg"


def test_a_dialect_of_a_newer_release_says_nothing_and_breaks_nothing() -> None:
    """A scheduler that is one release ahead may name what this app does not know: the call goes out without hints."""
    newer = EngineSpec(engine_id="a", url="http://127.0.0.1:1/v1", model="m", hints="of-tomorrow")
    sent = outward(newer.hints, Said(priority=1, run_id="r"))
    assert (dict(sent.body), dict(sent.headers)) == ({}, {})


# -- what servers make of it ----------------------------------------------------------------------------------------------
def emulator(slots: int = 1, **more: Any) -> Emulator:
    """One engine with so many slots, which orders by vLLM's priority."""
    profile = dataclasses.replace(CPU_TINY, max_num_seqs=slots)
    return Emulator(EmulatorConfig(models=(EmulatedModel(name="tiny", profile=profile),)), **more)


def spec(url: str, dialect: str, slots: int = 1) -> EngineSpec:
    return EngineSpec(engine_id="a", url=url, model="tiny", slots=slots, hints=dialect)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_late_urgent_call_overtakes_at_an_engine_that_orders(slots: int) -> None:
    """`maestro doctor --hints` says so of an engine that acts upon its dialect, and of another dialect that it does not."""
    with emulator(slots) as engine:
        (acted,) = doctor.check_hints([spec(engine.url, "vllm", slots)])
        (ignored,) = doctor.check_hints([spec(engine.url, "smg", slots)])
        (silent,) = doctor.check_hints([spec(engine.url, "none", slots)])
    assert (acted.status, "as meant" in acted.detail) == ("ok", True), acted
    assert (ignored.status, "not acted upon" in ignored.detail) == ("note", True), ignored
    assert "--priority-scheduler-enabled" in ignored.remedy
    assert silent.status == "ok"


def test_an_engine_that_turns_the_order_round_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger first where lower first is meant: the urgent call comes last, and the doctor says that it does."""

    def wrong(dialect: str, call: Said, *, now_s: float) -> Any:
        return outward(dialect, dataclasses.replace(call, priority=-(call.priority or 0)), now_s=now_s)

    monkeypatch.setattr(urgency, "outward", wrong)
    with emulator() as engine:
        (found,) = doctor.check_hints([spec(engine.url, "vllm")])
    assert (found.status, "turned round" in found.detail) == ("broken", True), found


def test_an_engine_with_room_for_all_shows_nothing_and_a_dead_one_is_broken() -> None:
    """Where nothing waits, no order can be seen, and it is not claimed; a server's own words are told."""
    with emulator(16) as engine:
        (free,) = doctor.check_hints([spec(engine.url, "vllm")])
        (absent,) = doctor.check_hints([dataclasses.replace(spec(engine.url, "vllm"), model="other")])
    (dead,) = doctor.check_hints([spec(engine.url, "vllm")])
    assert (free.status, "nothing waited" in free.detail) == ("note", True), free
    assert (absent.status, "404" in absent.detail) == ("broken", True), absent
    assert (dead.status, "ConnectError" in dead.detail) == ("broken", True), dead


# -- real routers: MAESTRO_TEST_VLLM_ROUTER and MAESTRO_TEST_SMG name their programs (docs/hints.md) ------------------------
VLLM_ROUTER = os.environ.get("MAESTRO_TEST_VLLM_ROUTER", "")
SMG = os.environ.get("MAESTRO_TEST_SMG", "")
no_vllm_router = pytest.mark.skipif(
    not VLLM_ROUTER, reason="no vllm-router: set MAESTRO_TEST_VLLM_ROUTER (docs/hints.md)"
)
no_smg = pytest.mark.skipif(not SMG, reason="no SMG: set MAESTRO_TEST_SMG (docs/hints.md)")


@contextmanager
def router(command: list[str], log: Path, ready: Callable[[str], bool]) -> Iterator[str]:
    """A router on a free port, once it serves; its URL ends in ``/v1``."""
    port = free_port()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())],
            stdout=out,
            stderr=out,
        )
        try:
            url, began_s = f"http://127.0.0.1:{port}/v1", time.monotonic()
            while not (_answers(f"{url}/models") and ready(url)):
                assert process.poll() is None, log.read_text(errors="replace")[-2000:]
                assert time.monotonic() - began_s < 90, log.read_text(errors="replace")[-2000:]
                time.sleep(0.1)
            yield url
        finally:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return "tiny" in httpx.get(url, timeout=2).text
    except httpx.HTTPError:
        return False


@no_vllm_router
@pytest.mark.slow
def test_vllm_router_orders_programs_by_our_hint_and_passes_it_on_as_vllm_takes_it(tmp_path: Path) -> None:
    """In front of an engine that would take all at once, one program at a time: the late urgent call overtakes; the engine gets
    the words as they were sent; a router of which no metrics are known is healthy.
    """
    seen: list[bytes] = []
    with emulator(16, on_request=seen.append) as engine:
        config = json.dumps({"max_active_programs_per_target": 1, "metrics_interval_seconds": 0.1})
        command = [VLLM_ROUTER, "--worker-urls", engine.url.removesuffix("/v1"), "--enable-program-scheduling"]
        with router([*command, "--program-scheduling-config-json", config], tmp_path / "log", lambda _: True) as url:
            found = asyncio.run(burst(spec(url, "vllm-router")))
            health = asyncio.run(_probe(spec(url, "vllm-router")))
            seen.clear()
            sent = outward("vllm-router", Said(run_id="r", stage_id="s", role="a", step=1, priority=5, deadline_s=9.5))
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **sent.body}
            assert httpx.post(f"{url}/chat/completions", json=body, timeout=20).status_code == 200
    assert found.verdict == "as meant", found
    assert health.healthy
    (arrived,) = map(json.loads, seen)
    assert {name: arrived[name] for name in sent.body} == sent.body


@no_smg
@pytest.mark.slow
def test_smg_serves_our_interactive_class_before_our_batch_class(tmp_path: Path) -> None:
    """In front of an engine that would take all at once, with the 64 slots that it counts for a worker which does not say its
    own, and none of them reserved: the late interactive call overtakes batch.
    """
    config = tmp_path / "classes.yaml"
    alike = "reserved_floor: 0, reserved_per_slot: 0.0, queue_size: 999, queue_timeout_secs: 60, starvation_threshold_secs: 60"
    classes = ("system", "interactive", "default", "bulk")
    config.write_text("classes:\n" + "".join(f"  {c}: {{{alike}, can_preempt: false}}\n" for c in classes))
    with emulator(256) as engine:
        command = [SMG, "launch", "--worker-urls", engine.url.removesuffix("/v1"), "--priority-scheduler-enabled"]
        command += ["--priority-scheduler-default-max-class", "interactive", "--priority-scheduler-config", str(config)]
        with router(command, tmp_path / "log", lambda _: True) as url:
            found = asyncio.run(burst(spec(url, "smg", slots=64)))
            health = asyncio.run(_probe(spec(url, "smg")))
    assert found.verdict == "as meant", found
    assert health.healthy


async def _probe(engine: EngineSpec) -> Any:
    probe = VllmProbe()
    try:
        return await probe.probe(engine)
    finally:
        await probe.close()
