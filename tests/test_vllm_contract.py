"""The emulator against a real vLLM: the same requests, the same protocol. ``pytest -m vllm tests/test_vllm_contract.py``

Needs ``MAESTRO_VLLM=/path/bin/vllm`` (``serving/vllm_cpu/setup.sh DIR`` makes one for CPUs) and, if you have one,
``MAESTRO_VLLM_MODEL=/path/to/tiny``; without it the tiny model is made by the same environment.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from maestro_agents.core import EngineSpec
from maestro_agents.simulator.engine import CPU_TINY
from maestro_serving.emulator import EmulatedModel, Emulator, EmulatorConfig
from maestro_serving.processes import EngineProcess, free_port
from maestro_serving.vllm import SCRAPED, VllmProbe, vllm_command

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

MAX_QUEUED = 12
MODEL_LEN = 2048
LONG = 1500
"""Tokens that keep an engine busy for some seconds."""
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"q": {"enum": ["a", "b"]}},
            "required": ["q"],
            "additionalProperties": False,
        },
    },
}
NAMED = {"type": "function", "function": {"name": "look"}}
ONE_CALL = {"parallel_tool_calls": False}
LABEL = {
    "type": "object",
    "properties": {"label": {"enum": ["x", "y"]}},
    "required": ["label"],
    "additionalProperties": False,
}
# Noise hardly ever says "end of text"; told to prefer it, it ends as soon as a grammar or min_tokens lets it.
ENDS = {"logit_bias": "end of text"}
# Ends by itself, in both: noise never says "end of text", so it is told to after three tokens.
STOPS = {
    "messages": [{"role": "user", "content": "[[tokens=3]]"}],
    "min_tokens": 3,
    "max_tokens": 30,
    **ENDS,
}


@pytest.fixture(scope="module")
def vllm():
    """The ``vllm`` program."""
    program = shutil.which(os.environ.get("MAESTRO_VLLM") or "vllm")
    if program is None:
        pytest.skip("no vLLM: set MAESTRO_VLLM=/path/bin/vllm (serving/vllm_cpu/setup.sh DIR makes one for CPUs)")
    return program


@pytest.fixture(scope="module")
def model_path(vllm, tmp_path_factory):
    """The tiny model."""
    if given := os.environ.get("MAESTRO_VLLM_MODEL"):
        return given
    out = tmp_path_factory.mktemp("tiny")
    script = Path(__file__).parents[1] / "serving" / "vllm_cpu" / "tiny_model.py"
    subprocess.run([Path(vllm).parent / "python", script, out], check=True, capture_output=True)
    return str(out)


@pytest.fixture(scope="module")
def real(vllm, model_path, tmp_path_factory):
    """A real engine that serves one request at a time, started by our own launcher."""
    port = free_port()
    command = vllm_command(
        program=vllm,
        model=model_path,
        served_model="tiny",
        port=port,
        max_num_seqs=1,
        max_model_len=MODEL_LEN,
        kv_cache_memory_bytes=256 << 20,
        max_num_queued=MAX_QUEUED,
        cpu_core=(os.cpu_count() or 1) - 1,
        args=(
            # Ten times the layers: the two-layer model makes tokens faster than a busy API server tells them, which then
            # has no time left for anybody else.
            *("--hf-overrides", '{"num_hidden_layers": 20}', "--load-format", "dummy"),
            "--enable-server-load-tracking",
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            # Noise would fill every gap of a grammar with blanks until its tokens are spent.
            *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
        ),
    )
    command = dataclasses.replace(command, env={**command.env, "VLLM_SERVER_DEV_MODE": "1"})
    log = tmp_path_factory.mktemp("vllm") / "engine.log"
    process = EngineProcess("real", command, url=f"http://127.0.0.1:{port}/v1", log=log)
    asyncio.run(process.start())
    yield process
    asyncio.run(process.stop())
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Clients of the real engine and of the emulator, and the token that ends a text in the real one."""

    clients: tuple[httpx.Client, httpx.Client]
    end_token: int


@pytest.fixture(scope="module")
def pair(real, model_path):
    """Clients of the real engine and of the emulator."""
    profile = dataclasses.replace(CPU_TINY, max_num_seqs=1, max_queued=MAX_QUEUED, max_model_len=MODEL_LEN)
    with Emulator(EmulatorConfig(models=(EmulatedModel(name="tiny", profile=profile),), dev_mode=True)) as emulator:
        urls = [url.removesuffix("/v1") for url in (real.url, emulator.url)]
        with httpx.Client(base_url=urls[0], timeout=60, trust_env=False) as a:
            with httpx.Client(base_url=urls[1], timeout=60, trust_env=False) as b:
                end_token = json.loads((Path(model_path) / "config.json").read_text())["eos_token_id"]
                yield Pair(clients=(a, b), end_token=end_token)


def body(path="/v1/chat/completions", **changes):
    """A small request; ``...`` takes a field out."""
    if path.endswith("responses"):
        base = {"model": "tiny", "input": "hello world", "max_output_tokens": 5}
    elif path.endswith("chat/completions"):
        base = {"model": "tiny", "messages": [{"role": "user", "content": "hello world"}], "max_tokens": 5}
    else:
        base = {"model": "tiny", "prompt": "hello world", "max_tokens": 5}
    return {k: v for k, v in {**base, **changes}.items() if v is not ...}


def kind(value):
    """The JSON kind of a value."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    return {str: "string", list: "list", dict: "object", type(None): "null"}[type(value)]


NOT_EMULATED = {
    "created_cache_tokens",
    "cache_write_tokens",
    "input_tokens_per_turn",
    "cached_tokens_per_turn",
    "tool_output_tokens",
    "output_tokens_per_turn",
    "tool_output_tokens_per_turn",
    "presence_penalty",
    "frequency_penalty",
    "permission",
    "strict",
}
"""Fields to which vLLM gives a value and of which no client makes use."""


def differences(real, emulated, where="$"):
    """How two JSON values differ in shape: invented fields, fields of another type, missing fields that have a value."""
    if real is None or emulated is None:
        return []
    if kind(real) != kind(emulated):
        return [f"{where}: {kind(real)} in vLLM, {kind(emulated)} here"]
    found: list[str] = []
    if isinstance(real, dict):
        found += [f"{where}.{key}: not in vLLM" for key in emulated.keys() - real.keys()]
        missing = {k for k, v in real.items() if v is not None} - emulated.keys() - NOT_EMULATED
        found += [f"{where}.{key}: missing here" for key in missing]
        for key in (real.keys() & emulated.keys()) - NOT_EMULATED:
            found += differences(real[key], emulated[key], f"{where}.{key}")
    if isinstance(real, list) and real and emulated:
        found += differences(real[0], emulated[0], f"{where}[0]")
    return found


def ask(pair, path, content):
    """Both answers."""
    if content.get("logit_bias") == ENDS["logit_bias"]:
        content = {**content, "logit_bias": {str(pair.end_token): 100}}
    return [client.post(path, json=content) for client in pair.clients]


ANSWERS = {
    "chat": ("/v1/chat/completions", {}),
    "chat, ends by itself": ("/v1/chat/completions", STOPS),
    "chat, n": ("/v1/chat/completions", {"n": 2}),
    "chat, ids": ("/v1/chat/completions", {"request_id": "mine"}),
    "chat, no model": ("/v1/chat/completions", {"model": ...}),
    "chat, both limits": ("/v1/chat/completions", {"max_tokens": 9, "max_completion_tokens": 3, "ignore_eos": True}),
    "chat, limit beyond the context left": (
        "/v1/chat/completions",
        {"max_tokens": MODEL_LEN, **{k: v for k, v in STOPS.items() if k != "max_tokens"}},
    ),
    "chat, unknown field": ("/v1/chat/completions", {"no_such_field": 1}),
    "chat, whole float as priority": ("/v1/chat/completions", {"priority": 2.0}),
    "chat, text as priority": ("/v1/chat/completions", {"priority": "3"}),
    "chat, tools unused": ("/v1/chat/completions", {"tools": [LOOK]}),
    "chat, tool required": (
        "/v1/chat/completions",
        {"tools": [LOOK], "tool_choice": "required", **ONE_CALL, "max_tokens": 1500, **ENDS},
    ),
    "chat, tool named": ("/v1/chat/completions", {"tools": [LOOK], "tool_choice": NAMED, "max_tokens": 1500, **ENDS}),
    "chat, schema": (
        "/v1/chat/completions",
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": LABEL}},
            "max_tokens": 200,
            **ENDS,
        },
    ),
    "completion": ("/v1/completions", {}),
    "completion, default limit": ("/v1/completions", {"max_tokens": ...}),
    "completion, prompts": ("/v1/completions", {"prompt": ["a", "b"]}),
    "completion, token ids": ("/v1/completions", {"prompt": [5, 6, 7]}),
    "responses": ("/v1/responses", {}),
    "responses, messages": (
        "/v1/responses",
        {"input": [{"role": "user", "content": "hi"}], "instructions": "be brief"},
    ),
    "responses, tool": (
        "/v1/responses",
        {
            "tools": [{"type": "function", **LOOK["function"]}],
            "tool_choice": "required",
            "max_output_tokens": 1500,
            **ENDS,
        },
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_have_the_same_shape(pair, name):
    """Status, fields, types, finish reasons and the number of choices are the same."""
    path, changes = ANSWERS[name]
    real, emulated = ask(pair, path, body(path, **changes))
    assert (real.status_code, emulated.status_code) == (200, 200), real.text
    a, b = real.json(), emulated.json()
    assert differences(a, b) == []
    assert [c["finish_reason"] for c in a.get("choices", [])] == [c["finish_reason"] for c in b.get("choices", [])]
    assert [o["type"] for o in a.get("output", [])][:1] == [o["type"] for o in b.get("output", [])][:1]
    assert a["id"].split("-")[0].split("_")[0] == b["id"].split("-")[0].split("_")[0]
    if "request_id" in changes:
        assert a["id"] == b["id"]
    if "schema" in name:
        assert all(json.loads(r["choices"][0]["message"]["content"])["label"] in ("x", "y") for r in (a, b))
    if "tool required" in name or "tool named" in name:
        for answer in (a, b):
            (call,) = answer["choices"][0]["message"]["tool_calls"]
            assert json.loads(call["function"]["arguments"])["q"] in ("a", "b")


def events(text):
    """The stream as its JSON objects, after a check of its framing."""
    lines = [line for line in text.splitlines() if line]
    assert text.endswith("data: [DONE]\n\n") or '"type":"response.completed"' in lines[-1].replace(" ", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def event_kind(event):
    """What an event of a stream is, without its content."""
    if "type" in event:
        return event["type"]
    if not event["choices"]:
        return "usage" + (" +metrics" if "metrics" in event else "")
    (choice,) = event["choices"]
    said = "text" if choice.get("text") is not None else ""
    if "delta" in choice:
        delta = choice["delta"]
        calls = delta.get("tool_calls") or []
        said = ",".join(sorted(k for k, v in delta.items() if v is not None))
        said += "".join(f"({','.join(sorted(c['function']))}{' id' if 'id' in c else ''})" for c in calls)
    done = choice.get("finish_reason")
    return said + (f" finish:{done}" if done else "") + (" +usage" if "usage" in event else "")


def kinds(stream):
    """Kinds of events in order, repetitions told once: how tokens are cut into chunks is a matter of timing."""
    found = [event_kind(e) for e in stream]
    return [k for i, k in enumerate(found) if i == 0 or found[i - 1] != k]


USAGE = {"stream_options": {"include_usage": True}}
STREAMS = {
    "chat": ("/v1/chat/completions", {"ignore_eos": True}),
    "chat, usage": ("/v1/chat/completions", {"ignore_eos": True, **USAGE}),
    "chat, usage not wanted": (
        "/v1/chat/completions",
        {"ignore_eos": True, "stream_options": {"include_usage": False}},
    ),
    "chat, usage in every chunk": (
        "/v1/chat/completions",
        {"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "chat, ends by itself": ("/v1/chat/completions", {**STOPS, **USAGE}),
    "chat, tool required": (
        "/v1/chat/completions",
        {"tools": [LOOK], "tool_choice": "required", **ONE_CALL, "max_tokens": 1500, **ENDS, **USAGE},
    ),
    "chat, tool named": (
        "/v1/chat/completions",
        {"tools": [LOOK], "tool_choice": NAMED, "max_tokens": 1500, **ENDS, **USAGE},
    ),
    "completion": ("/v1/completions", {"ignore_eos": True}),
    "completion, usage": ("/v1/completions", {"ignore_eos": True, **USAGE}),
    "responses": ("/v1/responses", {}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_have_the_same_shape(pair, name):
    """The sequence of kinds of events, the usage chunk, the end, and each event's fields are the same."""
    path, changes = STREAMS[name]
    real, emulated = ask(pair, path, body(path, stream=True, **changes))
    assert real.headers["content-type"] == emulated.headers["content-type"]
    a, b = events(real.text), events(emulated.text)
    assert kinds(a) == kinds(b)
    by_kind = {event_kind(e): e for e in a}
    for event in b:
        assert differences(by_kind[event_kind(event)], event) == []


ERRORS = {
    "unknown model": ("/v1/chat/completions", {"model": "nope"}),
    "fractional priority": ("/v1/chat/completions", {"priority": 1.5}),
    "priority beyond 64 bits": ("/v1/chat/completions", {"priority": 2**63}),
    "priority null": ("/v1/chat/completions", {"priority": None}),
    "prompt too long": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello " * MODEL_LEN}]}),
    "limit beyond the context": ("/v1/chat/completions", {"max_tokens": MODEL_LEN + 1}),
    "min above max": ("/v1/chat/completions", {"min_tokens": 9}),
    "max zero": ("/v1/chat/completions", {"max_tokens": 0}),
    "max negative": ("/v1/chat/completions", {"max_tokens": -1}),
    "n zero": ("/v1/chat/completions", {"n": 0}),
    "negative temperature": ("/v1/chat/completions", {"temperature": -1}),
    "messages no list": ("/v1/chat/completions", {"messages": "x"}),
    "messages missing": ("/v1/chat/completions", {"messages": ...}),
    "messages empty": ("/v1/chat/completions", {"messages": []}),
    "stream options without stream": ("/v1/chat/completions", USAGE),
    "tools empty": ("/v1/chat/completions", {"tools": []}),
    "tool choice without tools": ("/v1/chat/completions", {"tool_choice": "required"}),
    "tool choice unknown": (
        "/v1/chat/completions",
        {"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "nope"}}},
    ),
    "format unknown": ("/v1/chat/completions", {"response_format": {"type": "weird"}}),
    "schema missing": ("/v1/chat/completions", {"response_format": {"type": "json_schema"}}),
    "completion, unknown model": ("/v1/completions", {"model": "nope"}),
    "completion, no prompt": ("/v1/completions", {"prompt": ...}),
    "completion, empty prompt": ("/v1/completions", {"prompt": ""}),
    "completion, prompt too long": ("/v1/completions", {"prompt": "hello " * MODEL_LEN}),
    "responses, unknown model": ("/v1/responses", {"model": "nope"}),
    "responses, no input": ("/v1/responses", {"input": ...}),
    "responses, limit beyond the context": ("/v1/responses", {"max_output_tokens": MODEL_LEN + 1}),
    "responses, unknown predecessor": ("/v1/responses", {"previous_response_id": "resp_gone"}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_the_same_but_for_their_words(pair, name):
    """Status, shape, type, parameter and code; for a stream too, since it has not begun."""
    path, changes = ERRORS[name]
    for stream in {} if "stream" in name else ({}, {"stream": True}):
        real, emulated = ask(pair, path, body(path, **changes, **stream))
        assert real.status_code == emulated.status_code
        a, b = real.json()["error"], emulated.json()["error"]
        assert a.keys() == b.keys()
        assert {k: v for k, v in a.items() if k != "message"} == {k: v for k, v in b.items() if k != "message"}


@pytest.mark.parametrize("content", [b"{oops", b'"text"', b""])
def test_bodies_that_are_no_objects_are_refused_the_same_way(pair, content):
    """Broken JSON, JSON of another kind, nothing."""
    headers = {"content-type": "application/json"}
    real, emulated = [c.post("/v1/chat/completions", content=content, headers=headers) for c in pair.clients]
    assert real.status_code == emulated.status_code == 400
    assert real.json()["error"].keys() == emulated.json()["error"].keys()
    assert real.json()["error"]["type"] == emulated.json()["error"]["type"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("GET", "/version"), ("GET", "/v1/models"), ("GET", "/nope"), ("GET", "/v1/chat/completions")],
)
def test_the_servers_own_pages_agree(pair, method, path):
    """Status and shape of what is asked about the server, and of what is not there."""
    real, emulated = [c.request(method, path) for c in pair.clients]
    assert real.status_code == emulated.status_code
    if real.status_code == 200 and real.content:
        assert differences(real.json(), emulated.json()) == []
    if path == "/health":
        assert real.content == emulated.content == b""


def families(page):
    """Metric types by name, and label names by sample name."""
    types = dict(line.split()[2:4] for line in page.splitlines() if line.startswith("# TYPE vllm:"))
    labels: dict[str, set[str]] = {}
    for line in page.splitlines():
        if line.startswith("vllm:") and "{" in line:
            name, rest = line.split("{", 1)
            labels.setdefault(name, set()).update(part.split("=")[0] for part in rest.split("}")[0].split('",'))
    return types, labels


def test_metrics_have_vllms_names_types_and_labels(pair):
    """All that is emulated and all that the probe reads exists in a real vLLM."""
    for client in pair.clients:
        client.post("/v1/completions", json=body("/v1/completions"))
    (real_types, real_labels), (types, labels) = [families(c.get("/metrics").text) for c in pair.clients]
    assert len(types) >= 12
    assert set(SCRAPED) <= real_types.keys()
    assert {name: t for name, t in types.items() if real_types.get(name) != t} == {}
    for name, used in labels.items():
        extra = used - real_labels[name]
        assert not extra, f"{name}: {extra}"


def gauge(client, name):
    """One gauge of a server."""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(f"vllm:{name}{{"):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(name)


def in_flight(client):
    """Requests that a server has taken and not answered. vLLM's metrics page costs it too much to be asked for often."""
    load = client.get("/load")
    if load.status_code == 200:
        return load.json()["server_load"]
    return gauge(client, "num_requests_running") + gauge(client, "num_requests_waiting")


async def reached(look, value, limit_s=10.0):
    """Wait until a server says a number."""
    deadline_s = time.monotonic() + limit_s
    while (now := await asyncio.to_thread(look)) != value:
        assert time.monotonic() < deadline_s, f"{now}, not {value}, after {limit_s} s"
        await asyncio.sleep(0.02)


async def idle(client):
    """Wait until nothing runs or waits in the engine, for at most two seconds."""
    await reached(lambda: gauge(client, "num_requests_running") + gauge(client, "num_requests_waiting"), 0, 2)


@pytest.mark.parametrize("which", [0, 1], ids=["vllm", "emulator"])
async def test_who_waits_is_served_by_priority_then_arrival(pair, which):
    """Lower first, ties by arrival, None of it displacing whoever runs; the header wins over the body.

    What each is told of its own time: waiting counts as queue time and in nothing else.
    """
    client = pair.clients[which]
    order: list[int] = []
    told: list[dict[str, float]] = []
    waiting = [(5, {}), (0, {}), (-5, {}), (5, {}), (3, {}), (-2, {}), (0, {}), (9, {"X-Vllm-Priority": "-7"})]

    async def wait_in_line(http, n, priority, headers):
        content = body("/v1/completions", prompt=f"{n}", priority=priority, max_tokens=4, min_tokens=4, ignore_eos=True)
        answer = await http.post("/v1/completions", json=content, headers=headers)
        assert answer.status_code == 200
        order.append(n)
        told.append(answer.json()["metrics"])

    async with httpx.AsyncClient(base_url=client.base_url, timeout=60, trust_env=False) as http:
        first = body("/v1/completions", max_tokens=LONG, min_tokens=LONG, ignore_eos=True, priority=100)
        running = asyncio.create_task(http.post("/v1/completions", json=first))
        await reached(lambda: in_flight(client), 1)
        async with asyncio.TaskGroup() as group:
            for n, (priority, headers) in enumerate(waiting):
                group.create_task(wait_in_line(http, n, priority, headers))
                await reached(lambda n=n: in_flight(client), n + 2)
            assert order == []
            running.cancel()  # the first is abandoned: now the others have their turn
    effective = [int(h.get("X-Vllm-Priority", p)) for p, h in waiting]
    assert order == sorted(range(len(waiting)), key=lambda n: (effective[n], n))
    assert told[-1]["time_to_first_token_ms"] < told[-1]["queue_time_ms"]


@pytest.mark.parametrize("which", [0, 1], ids=["vllm", "emulator"])
async def test_clients_that_leave_free_the_engine(pair, which):
    """Two seconds after the disconnect neither the one that ran is running nor the one that waited is waiting."""
    client = pair.clients[which]
    content = body("/v1/completions", max_tokens=LONG, min_tokens=LONG, ignore_eos=True)
    async with httpx.AsyncClient(base_url=client.base_url, timeout=60, trust_env=False) as http:
        tasks = [asyncio.create_task(http.post("/v1/completions", json=content)) for _ in range(2)]
        await reached(lambda: gauge(client, "num_requests_waiting"), 1)
        assert gauge(client, "num_requests_running") == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await idle(client)


@pytest.mark.parametrize("which", [0, 1], ids=["vllm", "emulator"])
async def test_a_stream_that_is_closed_frees_the_engine(pair, which):
    """Two seconds after the reader left in the middle, nothing runs: thousands of tokens were still to come."""
    client = pair.clients[which]
    content = body("/v1/completions", max_tokens=LONG, min_tokens=LONG, ignore_eos=True, stream=True)
    generated = await asyncio.to_thread(gauge, client, "generation_tokens_total")
    async with httpx.AsyncClient(base_url=client.base_url, timeout=60, trust_env=False) as http:
        async with http.stream("POST", "/v1/completions", json=content) as running:
            lines = running.aiter_lines()
            await anext(lines)
    await idle(client)
    assert await asyncio.to_thread(gauge, client, "generation_tokens_total") < generated + LONG


async def test_a_full_queue_refuses_in_the_same_way(pair):
    """Beyond --max-num-queued-reqs, running ones included, both answer 503 of the same shape, streamed or not."""
    refusals = []
    for client in pair.clients:
        content = body("/v1/completions", max_tokens=LONG, min_tokens=LONG, ignore_eos=True)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60, trust_env=False) as http:
            tasks = [asyncio.create_task(http.post("/v1/completions", json=content)) for _ in range(MAX_QUEUED)]
            await reached(lambda client=client: in_flight(client), MAX_QUEUED)
            got = [await http.post("/v1/chat/completions", json=body(stream=s)) for s in (False, True)]
            got.append(await http.post("/v1/responses", json=body("/v1/responses")))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await idle(client)
        refusals.append([(r.status_code, {k: v for k, v in r.json()["error"].items() if k != "message"}) for r in got])
    assert refusals[0] == refusals[1]
    assert [status for status, _ in refusals[0]] == [503] * 3


async def test_the_probe_reads_both(pair):
    """Health, idleness and KV tokens, from the real page as from the emulated one."""
    probe = VllmProbe()
    for client in pair.clients:
        spec = EngineSpec(engine_id="a", url=f"{client.base_url}/v1", model="tiny")
        health = await probe.probe(spec)
        assert (health.healthy, health.running, health.waiting) == (True, 0, 0)
        assert health.kv_tokens >= MODEL_LEN
    await probe.close()


# -- the prefix cache --------------------------------------------------------------------------------------------------
CACHED = {
    "chat": ("/v1/chat/completions", lambda text: {"messages": [{"role": "user", "content": text}]}),
    "completion": ("/v1/completions", lambda text: {"prompt": text}),
    "responses": ("/v1/responses", lambda text: {"input": text}),
}


def cached_tokens(answer):
    """What an answer says it found in the prefix cache."""
    usage = answer.json()["usage"]
    details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
    return details["cached_tokens"]


@pytest.mark.parametrize("name", CACHED)
def test_a_prompt_that_was_there_is_found_again(pair, name):
    """Whole blocks of 128 tokens, at the second time, in the answer and in the metrics; another salt finds nothing, and after a
    reset nobody does.
    """
    path, said = CACHED[name]
    text = f"{name} and again " * 150
    found = []
    for client in pair.clients:
        client.post("/reset_prefix_cache")
        before = gauge(client, "prefix_cache_hits_total"), gauge(client, "prefix_cache_queries_total")

        def cached(client=client, **more):
            return cached_tokens(client.post(path, json=body(path, **said(text), **more)))

        first, second = cached(), cached()
        other, otherwise = cached(cache_salt="mine"), cached(cache_salt="mine")
        after = gauge(client, "prefix_cache_hits_total"), gauge(client, "prefix_cache_queries_total")
        assert client.post("/reset_prefix_cache").json() == {"success": True}
        assert (first, other, cached()) == (0, 0, 0)
        assert second == otherwise >= 256
        assert second % 128 == 0
        assert after[0] - before[0] == 2 * second
        assert after[1] - before[1] > 4 * second
        found.append(client.post(path, json=body(path, **said(text), cache_salt="")))
    assert differences(found[0].json(), found[1].json()) == []
    assert [f.status_code for f in found] == [400, 400]


def test_a_prompt_hits_what_it_shares_with_another_and_no_more(pair):
    """A common beginning is found, whatever follows it; without one nothing is."""
    for client in pair.clients:
        client.post("/reset_prefix_cache")
        texts = ["one two three four " * 60 + end for end in ("five " * 60, "six seven " * 60)] + ["other " * 240]
        found = [cached_tokens(client.post("/v1/completions", json=body("/v1/completions", prompt=t))) for t in texts]
        assert found[0] == found[2] == 0
        assert found[1] in (128, 256)


# -- dev mode ----------------------------------------------------------------------------------------------------------
ADMIN = (
    *("GET /is_sleeping", "GET /is_paused", "GET /sleep", "GET /pause"),
    *("POST /sleep?level=5", "POST /sleep?level=x", "POST /sleep?mode=bad", "POST /pause?mode=bad"),
    *("POST /wake_up", "POST /resume", "POST /reset_prefix_cache"),
    *("POST /sleep?level=1", "GET /is_sleeping", "GET /is_paused", "GET /health", "GET /v1/models"),
    *("POST /wake_up?tags=nonsense", "GET /is_sleeping", "POST /wake_up?tags=weights", "GET /is_sleeping"),
    *("POST /wake_up?tags=weights", "POST /wake_up?tags=kv_cache", "GET /is_sleeping", "GET /is_paused"),
    *("POST /sleep?level=2&mode=wait", "POST /sleep?level=1&mode=keep", "GET /is_sleeping"),
    *("POST /resume", "GET /is_paused", "GET /is_sleeping"),
    *("POST /wake_up?tags=weights&tags=kv_cache", "GET /is_sleeping"),
    *("POST /sleep?level=0", "GET /is_sleeping", "GET /is_paused", "POST /wake_up?tags=scheduling", "GET /is_sleeping"),
    *("POST /pause?mode=keep", "GET /is_paused", "GET /is_sleeping", "POST /wake_up", "GET /is_paused"),
    *("POST /pause?mode=wait", "POST /pause?mode=abort&clear_cache=false", "POST /resume", "GET /is_paused"),
    *("POST /abort_requests", "POST /abort_requests {}", "POST /abort_requests []", "POST /abort_requests {oops"),
    'POST /abort_requests {"request_ids": ["cmpl-nobody", "cmpl-none"]}',
    *("POST /collective_rpc", "POST /collective_rpc {}", "POST /collective_rpc []"),
)
"""Calls of an administrator, in order, on a server where nothing runs."""


@pytest.fixture(autouse=True)
def awake(pair):
    """Both servers are awake when a test has ended, however it did."""
    yield
    for client in pair.clients:
        client.post("/wake_up")


def sleep_state(client):
    """What the metrics say of sleep."""
    lines = client.get("/metrics").text.splitlines()
    return sorted(
        (line.split('sleep_state="')[1].split('"')[0], line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("vllm:engine_sleep_state{")
    )


def test_administrators_are_answered_alike(pair):
    """Sleep, wake, pause, abort: status, answer and metrics after each call of a long row are the same."""
    for step in ADMIN:
        method, path, *content = step.split(" ", 2)
        real, emulated = [c.request(method, path, content="".join(content)) for c in pair.clients]
        assert real.status_code == emulated.status_code, step
        assert sleep_state(pair.clients[0]) == sleep_state(pair.clients[1]), step
        if real.status_code == 200 and real.content and path != "/v1/models":
            assert real.json() == emulated.json(), step
        elif real.status_code == 400:
            a, b = real.json()["error"], emulated.json()["error"]
            assert {k: v for k, v in a.items() if k != "message"} == {k: v for k, v in b.items() if k != "message"}, (
                step
            )
    real, emulated = [families(c.get("/metrics").text)[0] for c in pair.clients]
    assert {k for k in real if "sleep" in k} == {k for k in emulated if "sleep" in k}


def aborted(text):
    """What an answer that was aborted says of its end, streamed or not."""
    if not text.startswith(("data: ", "event: ")):
        answer = json.loads(text)
        return [c["finish_reason"] for c in answer.get("choices", ())] or answer["status"], answer
    found = kinds(events(text)) if "{" in text else []
    return [kind for kind in found if kind not in ("content", "text", "role")], None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
async def test_sleep_aborts_what_is_under_way_in_the_same_way(pair, path, stream):
    """Whoever runs has 200, what was said so far, and the end `abort`; whoever waits has nothing; nobody is left."""
    ends = []
    for client in pair.clients:
        length = {"max_tokens": LONG, "min_tokens": LONG, "ignore_eos": True}
        if "responses" in path:  # knows no least length; noise hardly ever ends by itself
            length = {"max_output_tokens": LONG, "input": f"[[tokens={LONG}]]"}
        content = body(path, stream=stream, **length)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60, trust_env=False) as http:
            tasks = []
            for n in range(2):  # one runs, one waits
                tasks.append(asyncio.create_task(http.post(path, json=content)))
                await reached(lambda client=client: in_flight(client), n + 1)
            spoken = await asyncio.to_thread(gauge, client, "generation_tokens_total")
            while await asyncio.to_thread(gauge, client, "generation_tokens_total") < spoken + 3:
                await asyncio.sleep(0.02)
            counted = await asyncio.to_thread(abort_count, client)
            slept = await http.post("/sleep?level=1&mode=abort")
            answers = await asyncio.gather(*tasks)
            assert gauge(client, "num_requests_running") == gauge(client, "num_requests_waiting") == 0
            assert await asyncio.to_thread(abort_count, client) == counted + 2
            await http.post("/wake_up")
        assert [r.status_code for r in (slept, *answers)] == [200] * 3
        ends.append([aborted(r.text) for r in answers])
    for (real, whole), (emulated, other) in zip(*ends, strict=True):
        assert real == emulated
        assert differences(whole, other) == []
        if whole is not None and "responses" not in path:
            assert other["metrics"].keys() == {k for k in whole["metrics"] if k != "speculative_decoding"}
            assert [k for k, v in other["metrics"].items() if v is None] == [
                k for k, v in whole["metrics"].items() if v is None and k != "speculative_decoding"
            ]


def abort_count(client):
    """Requests that were answered with an abort."""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("vllm:request_success_total{") and 'finished_reason="abort"' in line:
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError


@pytest.mark.parametrize("how", ["sleep?level=1&mode=keep", "sleep?level=0&mode=keep", "pause?mode=keep"])
@pytest.mark.parametrize("which", [0, 1], ids=["vllm", "emulator"])
async def test_what_is_kept_is_frozen_and_goes_on(pair, which, how):
    """Asleep, nobody gets a token, newcomers hang and do not show, health is well; awake, all are answered whole."""
    client = pair.clients[which]
    content = body("/v1/completions", max_tokens=200, min_tokens=200, ignore_eos=True)
    async with httpx.AsyncClient(base_url=client.base_url, timeout=60, trust_env=False) as http:
        tasks = []
        for n in range(2):
            tasks.append(asyncio.create_task(http.post("/v1/completions", json=content)))
            await reached(lambda: in_flight(client), n + 1)
        await reached(lambda: gauge(client, "num_requests_waiting"), 1)
        assert (await http.post(f"/{how}")).status_code == 200
        before = await asyncio.to_thread(gauge, client, "generation_tokens_total")
        late = asyncio.create_task(http.post("/v1/completions", json=content))
        # Time passes: a few requests' worth of it, in which nothing may happen.
        for _ in range(20):
            assert (await http.get("/health")).status_code == 200
            await asyncio.sleep(0.02)
        assert await asyncio.to_thread(gauge, client, "generation_tokens_total") == before
        assert (gauge(client, "num_requests_running"), gauge(client, "num_requests_waiting")) == (1, 1)
        assert not any(task.done() for task in (*tasks, late))
        await http.post("/resume" if "pause" in how else "/wake_up")
        answers = await asyncio.gather(*tasks, late)
    assert [a.json()["usage"]["completion_tokens"] for a in answers] == [200] * 3
    assert answers[1].json()["metrics"]["queue_time_ms"] > 300
    await idle(client)


@pytest.mark.parametrize("which", [0, 1], ids=["vllm", "emulator"])
async def test_sleep_waits_for_what_runs_and_holds_what_waits(pair, which):
    """The call returns when the running request has ended; the waiting one shows as waiting, and is answered after the wake."""
    client = pair.clients[which]
    content = body("/v1/completions", max_tokens=100, min_tokens=100, ignore_eos=True)
    async with httpx.AsyncClient(base_url=client.base_url, timeout=60, trust_env=False) as http:
        tasks = []
        for n in range(2):
            tasks.append(asyncio.create_task(http.post("/v1/completions", json=content)))
            await reached(lambda: in_flight(client), n + 1)
        assert (await http.post("/sleep?level=2&mode=wait")).status_code == 200
        assert (await tasks[0]).json()["usage"]["completion_tokens"] == 100
        assert (gauge(client, "num_requests_running"), gauge(client, "num_requests_waiting")) == (0, 1)
        assert not tasks[1].done()
        assert (await http.get("/is_sleeping")).json() == {"is_sleeping": True}
        await http.post("/wake_up")
        assert (await tasks[1]).json()["usage"]["completion_tokens"] == 100
    await idle(client)


@pytest.mark.parametrize(
    ("path", "name"),
    [("/v1/completions", "cmpl-b-0"), ("/v1/chat/completions", "chatcmpl-b"), ("/v1/responses", "b_0")],
)
async def test_requests_are_aborted_by_their_ids(pair, path, name):
    """Who is named ends with what it has and 200, and does not count as answered; others go on; without names all end.

    A plain completion has the number of its prompt behind its id.
    """
    seen = []
    for client in pair.clients:
        length = {"max_tokens": LONG, "min_tokens": LONG, "ignore_eos": True}
        if "responses" in path:
            length = {"max_output_tokens": LONG, "input": f"[[tokens={LONG}]]"}
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60, trust_env=False) as http:
            tasks = []
            for who in "abc":
                tasks.append(asyncio.create_task(http.post(path, json={**body(path, **length), "request_id": who})))
                await reached(lambda client=client: in_flight(client), len(tasks))
            counted = await asyncio.to_thread(abort_count, client)
            nobody = await http.post("/abort_requests", json={"request_ids": ["cmpl-b", "nobody"]})
            assert in_flight(client) == 3
            named = await http.post("/abort_requests", json={"request_ids": [name]})
            second = await tasks[1]
            assert not tasks[0].done()
            everybody = await http.post("/abort_requests", json={})
            answers = [await tasks[0], second, await tasks[2]]
            assert await asyncio.to_thread(abort_count, client) == counted
        await idle(client)
        seen.append([nobody.json(), named.json(), everybody.json(), *(aborted(r.text)[0] for r in answers)])
    assert seen[0] == seen[1]
